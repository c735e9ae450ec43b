"""A third party's package: a pass, a preset, a backend, a target and a metric."""

from graphopt.registry import Preset
from graphopt.target import Target

PASSES = {"sample-scale": "graphopt_sample_plugin.passes:Scale"}

PRESETS = {"sample-preset": Preset("dead-code,sample-scale:factor=3", help="tidy up, then scale")}

BACKENDS = {"sample-runtime": "graphopt_sample_plugin.runtime:SampleRuntime"}

TARGETS = {
    "sample-target": Target(name="sample-target", help="where the sample runtime runs", backend="sample-runtime"),
}

METRICS = {"sample-gap": "graphopt_sample_plugin.metrics:Gap"}
