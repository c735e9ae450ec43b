"""Channel groups of shuffles, attention, gates and recurrence, against groups written out by hand.

A unit of each group is also removed: what is left computes what zeros in its place would.
"""

from __future__ import annotations

import pytest

from .lettered_groups import MAJOR, MINOR, groups_of, of_constants

# Channels that are shuffled


SHUFFLE = """
shuffle (float[1,4,2,2] x) => (float[1,3,2,2] out) <int64[5] apart = {1, 2, 4, 2, 2}, int64[4] joined = {1, 8, 2, 2}> {
  y = Conv(x, w0)
  kept, taken = Split<axis = 1, num_outputs = 2>(y)
  made = Conv(taken, w1)
  both = Concat<axis = 1>(kept, made)
  rows = Reshape(both, apart)
  columns = Transpose<perm = [0, 2, 1, 3, 4]>(rows)
  mixed = Reshape(columns, joined)
  out = Conv(mixed, w2)
}
"""
SHUFFLE_WEIGHTS = {"w0": (8, 4, 1, 1), "w1": (4, 4, 1, 1), "w2": (3, 8, 1, 1)}


def test_shuffled_channels_are_followed() -> None:
    kept, taken = groups_of(SHUFFLE, SHUFFLE_WEIGHTS)
    assert kept == {
        "both:1": "abcdabcd",
        "columns:1": "abcd",
        "kept:1": "abcd",
        "made:1": "abcd",
        "mixed:1": "aabbccdd",
        "rows:2": "abcd",
        "w0:0": "abcd....",
        "w1:0": "abcd",
        "w2:1": "aabbccdd",
        "y:1": "abcd....",
    }
    assert taken == {"taken:1": "abcd", "w0:0": "....abcd", "w1:1": "abcd", "y:1": "....abcd"}


def test_a_shuffle_between_grouped_convolutions() -> None:
    # Channel c of group g becomes channel g of group c.
    text = """
    shuffle (float[1,4,2,2] x) => (float[1,4,2,2] out)
    <int64[5] apart = {1, 2, 3, 2, 2}, int64[4] joined = {1, 6, 2, 2}> {
      y = Conv<group = 2>(x, w0)
      rows = Reshape(y, apart)
      columns = Transpose<perm = [0, 2, 1, 3, 4]>(rows)
      mixed = Reshape(columns, joined)
      out = Conv(mixed, w1)
    }
    """
    weights = {"w0": (6, 2, 1, 1), "w1": (4, 6, 1, 1)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == {"w0:0": "abcabc", "w1:1": "aabbcc"}


# Attention of small operators


ATTENTION = """
attention (float[1,S,4] x) => (float[1,S,4] out)
<int64[4] apart = {0, 0, 2, 3}, int64[3] joined = {0, 0, 6}, float scale = {0.5}> {
  q = MatMul(x, wq)
  qb = Add(q, bq)
  qh = Reshape(qb, apart)
  qt = Transpose<perm = [0, 2, 1, 3]>(qh)
  k = MatMul(x, wk)
  kh = Reshape(k, apart)
  kt = Transpose<perm = [0, 2, 3, 1]>(kh)
  v = MatMul(x, wv)
  vh = Reshape(v, apart)
  vt = Transpose<perm = [0, 2, 1, 3]>(vh)
  scores = MatMul(qt, kt)
  scaled = Mul(scores, scale)
  weights = Softmax<axis = -1>(scaled)
  heads = MatMul(weights, vt)
  ht = Transpose<perm = [0, 2, 1, 3]>(heads)
  row = Reshape(ht, joined)
  out = MatMul(row, wo)
}
"""
ATTENTION_WEIGHTS = {"wq": (4, 6), "bq": (6,), "wk": (4, 6), "wv": (4, 6), "wo": (6, 4)}


def test_whole_heads_go_together() -> None:
    (group,) = groups_of(ATTENTION, ATTENTION_WEIGHTS, MAJOR)
    flat, one = "aaabbb", "ab"
    assert group == {
        **dict.fromkeys(("bq:0", "k:2", "q:2", "qb:2", "row:2", "v:2", "wk:1", "wo:0", "wq:1", "wv:1"), flat),
        **dict.fromkeys(("heads:1", "kh:2", "kt:1", "qh:2", "qt:1", "scaled:1", "scores:1", "vh:2", "vt:1"), one),
        "ht:2": one,
        "weights:1": one,
    }


def test_one_number_of_each_head_goes_from_queries_and_keys_or_from_values() -> None:
    queries, values = groups_of(ATTENTION, ATTENTION_WEIGHTS, MINOR)
    flat, one = "abcabc", "abc"
    assert queries == {
        **dict.fromkeys(("bq:0", "k:2", "q:2", "qb:2", "wk:1", "wq:1"), flat),
        **dict.fromkeys(("kh:3", "kt:2", "qh:3", "qt:3"), one),
    }
    assert values == {
        **dict.fromkeys(("row:2", "v:2", "wo:0", "wv:1"), flat),
        **dict.fromkeys(("heads:3", "ht:3", "vh:3", "vt:3"), one),
    }


def test_queries_keys_and_values_of_one_product() -> None:
    text = """
    attention (float[1,S,4] x) => (float[1,S,4] out)
    <int64[5] apart = {0, 0, 3, 2, 2}, int64[3] joined = {0, 0, 4}, int64 one = {1}, int64 two = {2},
     int64 zero = {0}> {
      qkv = MatMul(x, w)
      parts = Reshape(qkv, apart)
      turned = Transpose<perm = [2, 0, 3, 1, 4]>(parts)
      q = Gather<axis = 0>(turned, zero)
      k = Gather<axis = 0>(turned, one)
      v = Gather<axis = 0>(turned, two)
      kt = Transpose<perm = [0, 1, 3, 2]>(k)
      scores = MatMul(q, kt)
      weights = Softmax<axis = -1>(scores)
      heads = MatMul(weights, v)
      ht = Transpose<perm = [0, 2, 1, 3]>(heads)
      row = Reshape(ht, joined)
      out = MatMul(row, wo)
    }
    """
    weights = {"w": (4, 12), "wo": (4, 4)}
    (heads,) = of_constants(groups_of(text, weights, MAJOR), weights)
    assert heads == {"w:1": "aabb" * 3, "wo:0": "aabb"}
    # Queries, keys and values lie in one tensor, whose last axis is cut for all of them.
    (inside,) = of_constants(groups_of(text, weights, MINOR), weights)
    assert inside == {"w:1": "ab" * 6, "wo:0": "abab"}


GROUPED_QUERIES = """
attention (float[1,S,6] x) => (float[1,S,6] out)
<int64[4] apart = {0, 0, 4, 2}, int64[4] keys_apart = {0, 0, 2, 2}, int64[3] joined = {0, 0, 8},
     int64[1] axis = {2},
 int64[5] twice = {1, 1, 2, 1, 1}, int64[4] repeated = {0, 4, -1, 2}> {
  q = MatMul(x, wq)
  qh = Reshape(q, apart)
  qt = Transpose<perm = [0, 2, 1, 3]>(qh)
  k = MatMul(x, wk)
  kh = Reshape(k, keys_apart)
  kt = Transpose<perm = [0, 2, 1, 3]>(kh)
  k1 = Unsqueeze(kt, axis)
  k2 = Expand(k1, twice)
  k4 = Reshape(k2, repeated)
  kc = Transpose<perm = [0, 1, 3, 2]>(k4)
  v = MatMul(x, wv)
  vh = Reshape(v, keys_apart)
  vt = Transpose<perm = [0, 2, 1, 3]>(vh)
  v1 = Unsqueeze(vt, axis)
  v2 = Expand(v1, twice)
  v4 = Reshape(v2, repeated)
  scores = MatMul(qt, kc)
  weights = Softmax<axis = -1>(scores)
  heads = MatMul(weights, v4)
  ht = Transpose<perm = [0, 2, 1, 3]>(heads)
  row = Reshape(ht, joined)
  out = MatMul(row, wo)
}
"""
GROUPED_WEIGHTS = {"wq": (6, 8), "wk": (6, 4), "wv": (6, 4), "wo": (8, 6)}


def test_a_head_of_keys_goes_with_all_queries_that_read_it() -> None:
    (group,) = groups_of(GROUPED_QUERIES, GROUPED_WEIGHTS, MAJOR)
    assert of_constants([group], GROUPED_WEIGHTS) == [
        {"wk:1": "aabb", "wo:0": "aaaabbbb", "wq:1": "aaaabbbb", "wv:1": "aabb"}
    ]
    assert group["k2:1"] == "ab"
    assert group["k4:1"] == "aabb"
    assert group["scores:1"] == "aabb"
    assert "k2:2" not in group


def test_numbers_inside_of_heads_of_grouped_queries() -> None:
    groups = groups_of(GROUPED_QUERIES, GROUPED_WEIGHTS, MINOR)
    assert of_constants(groups, GROUPED_WEIGHTS) == [
        {"wk:1": "abab", "wq:1": "abababab"},
        {"wo:0": "abababab", "wv:1": "abab"},
    ]


def test_keys_that_are_cached_outside_stay_and_queries_of_each_go() -> None:
    text = """
    attention (float[1,S,6] x, float[1,2,P,2] past_keys, float[1,2,P,2] past_values)
    => (float[1,S,6] out, float[1,2,T,2] keys, float[1,2,T,2] values)
    <int64[4] apart = {0, 0, 4, 2}, int64[4] keys_apart = {0, 0, 2, 2}, int64[3] joined = {0, 0, 8},
     int64[1] axis = {2},
     int64[5] twice = {1, 1, 2, 1, 1}, int64[4] repeated = {0, 4, -1, 2}> {
      q = MatMul(x, wq)
      qh = Reshape(q, apart)
      qt = Transpose<perm = [0, 2, 1, 3]>(qh)
      k = MatMul(x, wk)
      kh = Reshape(k, keys_apart)
      kt = Transpose<perm = [0, 2, 1, 3]>(kh)
      keys = Concat<axis = 2>(past_keys, kt)
      k1 = Unsqueeze(keys, axis)
      k2 = Expand(k1, twice)
      k4 = Reshape(k2, repeated)
      kc = Transpose<perm = [0, 1, 3, 2]>(k4)
      v = MatMul(x, wv)
      vh = Reshape(v, keys_apart)
      vt = Transpose<perm = [0, 2, 1, 3]>(vh)
      values = Concat<axis = 2>(past_values, vt)
      v1 = Unsqueeze(values, axis)
      v2 = Expand(v1, twice)
      v4 = Reshape(v2, repeated)
      scores = MatMul(qt, kc)
      weights = Softmax<axis = -1>(scores)
      heads = MatMul(weights, v4)
      ht = Transpose<perm = [0, 2, 1, 3]>(heads)
      row = Reshape(ht, joined)
      out = MatMul(row, wo)
    }
    """
    for layout in (MAJOR, MINOR):
        (group,) = of_constants(groups_of(text, GROUPED_WEIGHTS, layout), GROUPED_WEIGHTS)
        # The first query of each head of keys, or the second.
        assert group == {"wo:0": "aabbaabb", "wq:1": "aabbaabb"}


def test_keys_repeated_by_tile() -> None:
    text = """
    attention (float[1,S,6] x) => (float[1,4,S,S] out)
    <int64[4] apart = {0, 0, 4, 2}, int64[4] keys_apart = {0, 0, 2, 2}, int64[4] twice = {1, 2, 1, 1}> {
      q = MatMul(x, wq)
      qh = Reshape(q, apart)
      qt = Transpose<perm = [0, 2, 1, 3]>(qh)
      k = MatMul(x, wk)
      kh = Reshape(k, keys_apart)
      kt = Transpose<perm = [0, 2, 3, 1]>(kh)
      k4 = Tile(kt, twice)
      out = MatMul(qt, k4)
    }
    """
    weights = {"wq": (6, 8), "wk": (6, 4)}
    (inside,) = of_constants(groups_of(text, weights, MAJOR), weights)
    # The heads are an output of the model: of the two sides, only the inner one can be cut.
    assert inside == {"wk:1": "abab", "wq:1": "abababab"}


ROTATED_HALVES = """
rotated (float[1,S,4] x, float[1,S] places) => (float[1,2,S,S] out)
<int64[4] apart = {0, 0, 2, 4}, int64[1] axis = {1}, int64[1] last = {2}, int64[1] zero = {0}, int64[1] half = {2},
 int64[1] end = {9223372036854775807}, int64[1] rows = {3}> {
  column = Unsqueeze(places, last)
  angles = MatMul(column, speeds)
  both = Concat<axis = -1>(angles, angles)
  cosine = Cos(both)
  sine = Sin(both)
  cos4 = Unsqueeze(cosine, axis)
  sin4 = Unsqueeze(sine, axis)
  q = MatMul(x, wq)
  qh = Reshape(q, apart)
  qt = Transpose<perm = [0, 2, 1, 3]>(qh)
  left = Slice(qt, zero, half, rows)
  right = Slice(qt, half, end, rows)
  minus = Neg(right)
  turned = Concat<axis = -1>(minus, left)
  straight = Mul(qt, cos4)
  crossed = Mul(turned, sin4)
  qr = Add(straight, crossed)
  k = MatMul(x, wk)
  kh = Reshape(k, apart)
  kt = Transpose<perm = [0, 2, 3, 1]>(kh)
  out = MatMul(qr, kt)
}
"""
ROTATED_WEIGHTS = {"wq": (4, 8), "wk": (4, 8), "speeds": (1, 2)}


def test_numbers_that_a_rotary_embedding_turns_together() -> None:
    (pairs,) = groups_of(ROTATED_HALVES, ROTATED_WEIGHTS, MINOR)
    # Element j and element j + 2 of four in a head are one pair, and so are the columns of both tables.
    assert of_constants([pairs], ROTATED_WEIGHTS) == [{"speeds:1": "ab", "wk:1": "abababab", "wq:1": "abababab"}]
    assert pairs["both:2"] == "abab"
    assert pairs["left:3"] == "ab"


def test_pairs_of_neighbours() -> None:
    text = """
    rotated (float[1,S,4] x) => (float[1,2,S,S] out)
    <int64[4] apart = {0, 0, 2, 4}, int64[4] joined = {0, 2, -1, 4}, int64[1] zero = {0}, int64[1] one = {1},
     int64[1] two = {2}, int64[1] rows = {3}, int64[1] last = {-1}, int64[1] end = {9223372036854775807}> {
      q = MatMul(x, wq)
      qh = Reshape(q, apart)
      qt = Transpose<perm = [0, 2, 1, 3]>(qh)
      even = Slice(qt, zero, end, rows, two)
      odd = Slice(qt, one, end, rows, two)
      even_turned = Mul(even, cosines)
      odd_turned = Mul(odd, cosines)
      even_column = Unsqueeze(even_turned, last)
      odd_column = Unsqueeze(odd_turned, last)
      pairs = Concat<axis = -1>(even_column, odd_column)
      qr = Reshape(pairs, joined)
      k = MatMul(x, wk)
      kh = Reshape(k, apart)
      kt = Transpose<perm = [0, 2, 3, 1]>(kh)
      out = MatMul(qr, kt)
    }
    """
    weights = {"wq": (4, 8), "wk": (4, 8), "cosines": (2,)}
    (pairs,) = of_constants(groups_of(text, weights), weights)
    assert pairs == {"cosines:0": "ab", "wk:1": "aabbaabb", "wq:1": "aabbaabb"}


# Gates


def test_a_gate_and_what_it_gates() -> None:
    text = """
    gated (float[N,4] x) => (float[N,2] out) {
      gate = MatMul(x, wg)
      curve = Sigmoid(gate)
      swish = Mul(gate, curve)
      up = MatMul(x, wu)
      product = Mul(swish, up)
      out = MatMul(product, wd)
    }
    """
    weights = {"wg": (4, 3), "wu": (4, 3), "wd": (3, 2)}
    (group,) = groups_of(text, weights)
    columns = ("curve:1", "gate:1", "product:1", "swish:1", "up:1", "wd:0", "wg:1", "wu:1")
    assert group == dict.fromkeys(columns, "abc")


def test_a_gate_in_one_product_with_what_it_gates() -> None:
    text = """
    gated (float[N,4] x) => (float[N,2] out) {
      both = MatMul(x, w)
      gate, up = Split<axis = -1, num_outputs = 2>(both)
      curve = Gelu(gate)
      product = Mul(curve, up)
      out = MatMul(product, wd)
    }
    """
    weights = {"w": (4, 6), "wd": (3, 2)}
    (group,) = groups_of(text, weights)
    halves = ("curve:1", "gate:1", "product:1", "up:1", "wd:0")
    assert group == {**dict.fromkeys(halves, "abc"), "both:1": "abcabc", "w:1": "abcabc"}


# Recurrence


def test_hidden_units_of_an_lstm() -> None:
    text = """
    recurrent (float[5,1,3] x) => (float[5,1,2] out) <int64[3] joined = {0, 0, -1}> {
      seen = MatMul(x, w0)
      y, h, c = LSTM<hidden_size = 2, direction = "bidirectional">(seen, w, r, b, , h0, c0, p)
      turned = Transpose<perm = [0, 2, 1, 3]>(y)
      row = Reshape(turned, joined)
      out = MatMul(row, w1)
    }
    """
    weights = {
        "w0": (3, 4),
        "w": (2, 8, 4),
        "r": (2, 8, 2),
        "b": (2, 16),
        "h0": (2, 1, 2),
        "c0": (2, 1, 2),
        "p": (2, 6),
        "w1": (4, 2),
    }
    seen, units = groups_of(text, weights)
    assert seen == {"seen:2": "abcd", "w0:1": "abcd", "w:2": "abcd"}
    assert units == {
        "b:1": "ab" * 8,
        "c0:2": "ab",
        "h0:2": "ab",
        "p:1": "ab" * 3,
        "r:1": "ab" * 4,
        "r:2": "ab",
        "w:1": "ab" * 4,
        "c:2": "ab",
        "h:2": "ab",
        "row:2": "abab",
        "turned:3": "ab",
        "w1:0": "abab",
        "y:3": "ab",
    }


@pytest.mark.parametrize(("operator", "gates"), [("GRU", 3), ("RNN", 1)])
def test_hidden_units_of_other_recurrent_layers(operator: str, gates: int) -> None:
    text = f"""
    recurrent (float[5,1,3] x) => (float[1,2] out) <int64[1] axis = {{0}}> {{
      y, h = {operator}<hidden_size = 2>(x, w, r, b)
      state = Squeeze(h, axis)
      out = MatMul(state, w1)
    }}
    """
    weights = {"w": (1, 2 * gates, 3), "r": (1, 2 * gates, 2), "b": (1, 4 * gates), "w1": (2, 2)}
    (units,) = groups_of(text, weights)
    assert units == {
        "b:1": "ab" * (2 * gates),
        "h:2": "ab",
        "r:1": "ab" * gates,
        "r:2": "ab",
        "state:1": "ab",
        "w1:0": "ab",
        "w:1": "ab" * gates,
        "y:3": "ab",
    }
