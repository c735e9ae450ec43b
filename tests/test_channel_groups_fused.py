"""Channel groups of operators that fuse what others take apart, against groups written out by hand.

A unit of each group is also removed: what is left computes what zeros in its place would.
"""

from __future__ import annotations

import pytest

from graphopt.passes.analyses.channel_groups import channel_groups

from .lettered_groups import MAJOR, MINOR, groups_of, letters, model_of, of_constants, reasons

# Attention in one operator


def test_whole_heads_of_an_attention_operator() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v, mask)
      out = MatMul(y, wo)
    }
    """
    weights = {"wq": (4, 8), "wk": (4, 4), "wv": (4, 6), "wo": (12, 4), "mask": (1, 4, 3, 3)}
    for layout in (MAJOR, MINOR):
        (group,) = of_constants(groups_of(text, weights, layout, opset=23), weights)
        assert group == {"mask:1": "aabb", "wk:1": "aabb", "wo:0": "aaaaaabbbbbb", "wq:1": "aaaabbbb", "wv:1": "aaabbb"}


def test_attention_of_heads_on_an_axis() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out)
    <int64[4] apart = {0, 0, 2, 2}, int64[3] joined = {0, 0, 4}> {
      q = MatMul(x, wq)
      qh = Reshape(q, apart)
      qt = Transpose<perm = [0, 2, 1, 3]>(qh)
      y = Attention(qt, qt, qt)
      yt = Transpose<perm = [0, 2, 1, 3]>(y)
      row = Reshape(yt, joined)
      out = MatMul(row, wo)
    }
    """
    weights = {"wq": (4, 4), "wo": (4, 4)}
    for layout in (MAJOR, MINOR):
        (group,) = of_constants(groups_of(text, weights, layout, opset=23), weights)
        assert group == {"wo:0": "aabb", "wq:1": "aabb"}


def test_whole_heads_of_runtime_attention() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v, bias)
      out = MatMul(y, wo)
    }
    """
    weights = {"wq": (4, 4), "wk": (4, 4), "wv": (4, 6), "bias": (14,), "wo": (6, 4)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == {
        "bias:0": "aabbaabbaaabbb",
        "wk:1": "aabb",
        "wo:0": "aaabbb",
        "wq:1": "aabb",
        "wv:1": "aaabbb",
    }


def test_keys_and_values_whose_heads_lie_on_an_axis() -> None:
    """Their third axis is that of the rows, of any number, and not that of the heads."""
    text = """
    attention (float[N,S,4] x, float[N,T,4] other) => (float[N,S,4] out) <int64[4] apart = {0, -1, 2, 2}> {
      q = MatMul(x, wq)
      k = MatMul(other, wk)
      v = MatMul(other, wv)
      k_apart = Reshape(k, apart)
      v_apart = Reshape(v, apart)
      k_heads = Transpose<perm = [0, 2, 1, 3]>(k_apart)
      v_heads = Transpose<perm = [0, 2, 1, 3]>(v_apart)
      y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k_heads, v_heads)
      out = MatMul(y, wo)
    }
    """
    weights = dict.fromkeys(("wk", "wo", "wq", "wv"), (4, 4))
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == dict.fromkeys(("wk:1", "wo:0", "wq:1", "wv:1"), "aabb")


def test_packed_queries_of_a_grouped_attention_operator() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) <int32[1] lengths = {2}, int32[1] total = {3}> {
      packed = MatMul(x, w)
      y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(packed, , , , , lengths, total)
      out = MatMul(y, wo)
    }
    """
    weights = {"w": (4, 64), "wo": (32, 4)}  # the runtime wants heads of 8 or more
    (group,) = of_constants(groups_of(text, weights), weights)
    head = "a" * 8 + "b" * 8
    assert group == {"w:1": "a" * 16 + "b" * 16 + head * 2, "wo:0": "a" * 16 + "b" * 16}


def test_heads_of_queries_of_a_single_head_of_keys_go_one_by_one() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      y = Attention<q_num_heads = 2, kv_num_heads = 1>(q, k, k)
      out = MatMul(y, wo)
    }
    """
    weights = {"wq": (4, 4), "wk": (4, 2), "wo": (4, 4)}
    (group,) = of_constants(groups_of(text, weights, opset=23), weights)
    assert group == {"wo:0": "aabb", "wq:1": "aabb"}


def test_queries_go_from_each_head_of_keys_that_is_cached_outside() -> None:
    text = """
    attention (float[1,3,4] x, float[1,2,2,8] keys, float[1,2,2,8] values)
    => (float[1,3,4] out, float[1,2,5,8] k, float[1,2,5,8] v) <int32[1] lengths = {4}, int32[1] total = {5}> {
      packed = MatMul(x, w)
      y, k, v = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(packed, , , keys, values, lengths,
        total)
      out = MatMul(y, wo)
    }
    """
    weights = {"w": (4, 64), "wo": (32, 4)}
    (group,) = of_constants(groups_of(text, weights), weights)
    each = "a" * 8 + "b" * 8
    assert group == {"w:1": each + each + "." * 32, "wo:0": each + each}


def test_fused_operators_around_attention() -> None:
    text = """
    fused (float[1,3,4] x) => (float[1,3,4] out) {
      inner = MatMul(x, w0)
      curve = com.microsoft.BiasGelu(inner, b0)
      back = com.microsoft.FusedMatMul<transB = 1>(curve, w1)
      sum, , , skip = com.microsoft.SkipLayerNormalization(back, x, scale, shift)
      out = Add(sum, skip)
    }
    """
    weights = {"w0": (4, 5), "b0": (5,), "w1": (4, 5), "scale": (4,), "shift": (4,)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == {"b0:0": "abcde", "w0:1": "abcde", "w1:1": "abcde"}


def test_halves_that_a_runtime_gates() -> None:
    text = """
    gated (float[1,3,4] x) => (float[1,3,2] out) {
      both = MatMul(x, w)
      product = com.microsoft.BiasSplitGelu(both, bias)
      out = MatMul(product, wd)
    }
    """
    weights = {"w": (4, 6), "bias": (6,), "wd": (3, 2)}
    model = model_of(text.replace("{\n", "<float[1,3,3] product> {\n", 1), weights)
    (group,) = channel_groups(model).groups
    assert of_constants([letters(group)], weights) == [{"bias:0": "abcabc", "w:1": "abcabc", "wd:0": "abc"}]


def test_heads_that_do_not_fit_are_left_alone() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) {
      q = MatMul(x, wq)
      y = com.microsoft.MultiHeadAttention<num_heads = 3>(q, q, q)
      out = MatMul(y, wo)
    }
    """
    found = channel_groups(model_of(text, {"wq": (4, 4), "wo": (4, 4)}))
    assert not found.groups
    assert "it does not divide into heads" in reasons(found)


def test_heads_of_attention_that_holds_its_weights() -> None:
    text = """
    attention (float[1,3,3] x) => (float[1,3,4] out) <float[1,3,6] y> {
      seen = MatMul(x, w0)
      y = com.microsoft.Attention<num_heads = 2, qkv_hidden_sizes = [4, 4, 6]>(seen, w, bias)
      out = MatMul(y, wo)
    }
    """
    weights = {"w0": (3, 5), "w": (5, 14), "bias": (14,), "wo": (6, 4)}
    seen, heads = of_constants(groups_of(text, weights), weights)
    assert seen == {"w0:1": "abcde", "w:0": "abcde"}
    assert heads == {"bias:0": "aabbaabbaaabbb", "w:1": "aabbaabbaaabbb", "wo:0": "aaabbb"}


def test_queries_keys_and_values_in_one_tensor() -> None:
    text = """
    attention (float[1,3,4] x) => (float[1,3,4] out) <int64[5] apart = {1, 3, 2, 3, 8}> {
      all = MatMul(x, w)
      qkv = Reshape(all, apart)
      y = com.microsoft.MultiHeadAttention<num_heads = 2>(qkv)
      out = MatMul(y, wo)
    }
    """
    weights = {"w": (4, 48), "wo": (16, 4)}
    model = model_of(text.replace("{1, 3, 2, 3, 8}>", "{1, 3, 2, 3, 8}, float[1,3,16] y>"), weights)
    (group,) = channel_groups(model, MAJOR).groups
    assert of_constants([letters(group)], weights) == [{"w:1": "a" * 24 + "b" * 24, "wo:0": "a" * 8 + "b" * 8}]


@pytest.mark.parametrize("flat", [True, False], ids=["heads in a row", "heads on an axis"])
def test_whole_heads_that_an_operator_rotates(flat: bool) -> None:
    rotated = "r = RotaryEmbedding<num_heads = 2>(q, cosines, sines, places)\nt = Reshape(r, apart)"
    if not flat:
        rotated = """
        h = Reshape(q, apart)
        ht = Transpose<perm = [0, 2, 1, 3]>(h)
        r = RotaryEmbedding(ht, cosines, sines, places)
        t = Transpose<perm = [0, 2, 1, 3]>(r)
        """
    text = f"""
    rotated (float[1,3,4] x) => (float[1,3,4] out)
    <int64[4] apart = {{1, 3, 2, 4}}, int64[3] joined = {{1, 3, 8}}, int64[1,3] places = {{0, 1, 2}}> {{
      q = MatMul(x, wq)
      {rotated}
      row = Reshape(t, joined)
      out = MatMul(row, wo)
    }}
    """
    weights = {"wq": (4, 8), "cosines": (5, 2), "sines": (5, 2), "wo": (8, 4)}
    for layout in (MAJOR, MINOR):
        (group,) = of_constants(groups_of(text, weights, layout, opset=23), weights)
        assert group == {"wo:0": "aaaabbbb", "wq:1": "aaaabbbb"}


def test_rotated_heads_counted_by_the_width_of_a_table() -> None:
    text = """
    rotated (float[1,3,4] x) => (float[1,3,4] out) <int64[1,3] places = {0, 1, 2}> {
      q = MatMul(x, wq)
      r = com.microsoft.RotaryEmbedding(q, places, cosines, sines)
      out = MatMul(r, wo)
    }
    """
    weights = {"wq": (4, 8), "cosines": (5, 2), "sines": (5, 2), "wo": (8, 4)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == {"wo:0": "aaaabbbb", "wq:1": "aaaabbbb"}


def test_embeddings_normalised_in_one_operator() -> None:
    text = """
    embedded (int32[1,3] ids, int32[1,3] parts) => (float[1,3,2] out) <float[1,3,4] y> {
      y, mask = com.microsoft.EmbedLayerNormalization(ids, parts, words, places, kinds, scale, shift)
      out = MatMul(y, w)
    }
    """
    weights = {"words": (7, 4), "places": (3, 4), "kinds": (2, 4), "scale": (4,), "shift": (4,), "w": (4, 2)}
    (group,) = channel_groups(model_of(text, weights)).groups
    columns = ("kinds:1", "places:1", "scale:0", "shift:0", "w:0", "words:1")
    assert of_constants([letters(group)], weights) == [dict.fromkeys(columns, "abcd")]
    assert [node.op_type for node in group.mixers] == ["EmbedLayerNormalization"]


def test_rows_of_embeddings_are_as_many_as_are_asked_for() -> None:
    text = """
    embedded (int32[1,4] ids, int32[1,4] parts) => (float[1,2,3] out) <float[1,4,2] y> {
      y, mask = com.microsoft.EmbedLayerNormalization(ids, parts, words, places, kinds, scale, shift)
      moved = Add(y, more)
      turned = Transpose<perm = [0, 2, 1]>(moved)
      out = MatMul(turned, w)
    }
    """
    weights = {"words": (7, 2), "places": (4, 2), "kinds": (2, 2), "scale": (2,), "shift": (2,), "more": (4, 2)}
    found = channel_groups(model_of(text, weights | {"w": (4, 3)}))
    assert not found.groups
    assert "`ids` is an input of the model" in reasons(found)


def test_a_convolution_that_adds_and_activates() -> None:
    text = """
    residual (float[1,2,4,4] x) => (float[1,2,4,4] out) <float[1,3,4,4] z> {
      y = Conv(x, w0)
      z = com.microsoft.FusedConv<activation = "Relu", kernel_shape = [1, 1]>(y, w1, bias, y)
      out = Conv(z, w2)
    }
    """
    weights = {"w0": (3, 2, 1, 1), "w1": (3, 3, 1, 1), "bias": (3,), "w2": (2, 3, 1, 1)}
    (group,) = of_constants(groups_of(text, weights), weights)
    assert group == dict.fromkeys(("bias:0", "w0:0", "w1:0", "w1:1", "w2:1"), "abc")


def test_factors_whose_batches_lie_inside() -> None:
    # transBatchA: [rows, batch, shared] is taken as [batch, rows, shared].
    text = """
    turned (float[3,2,4] x) => (float[2,3,2] out) <float[2,3,5] z> {
      y = MatMul(x, w0)
      z = com.microsoft.FusedMatMul<transBatchA = 1>(y, w1)
      out = MatMul(z, w2)
    }
    """
    weights = {"w0": (4, 3), "w1": (2, 3, 5), "w2": (5, 2)}
    before, behind = of_constants(groups_of(text, weights), weights)
    assert before == {"w0:1": "abc", "w1:1": "abc"}
    assert behind == {"w1:2": "abcde", "w2:0": "abcde"}
