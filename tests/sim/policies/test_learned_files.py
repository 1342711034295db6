"""Files of learned policies from anywhere: what does not fit is refused with one line that names file and value."""

from __future__ import annotations

import inspect
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sim.cost.model_spec import load_model
from sim.errors import ConfigError, RapLabError
from sim.policies.base import PolicyContext
from sim.policies.learned import Network, prune_network, read_learned
from sim.policies.learned_files import MAX_JSON_BYTES, MAX_WEIGHT_BYTES, PLANS, _plan_count, strict_json
from sim.policies.learned_serve import learned_serve
from sim.policies.observation.prune import prune_table
from sim.policies.observation.serve import serve_actions
from tests.sim.policies.test_learned import exported
from tests.sim.serving import TINY


def refusal(path: Path) -> str:
    """The one line with which a policy of PruneToBudget is refused."""
    with pytest.raises(ConfigError) as caught:
        prune_network(TINY, path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def with_tensors(path: Path, **changed: Any) -> Path:
    """Replace tensors of a policy; ``_0_weight`` stands for 0.weight."""
    arrays = load_file(path.with_suffix(".safetensors"))
    arrays |= {name.strip("_").replace("_", "."): value for name, value in changed.items()}
    save_file(arrays, path.with_suffix(".safetensors"))
    return path


def with_header(path: Path, header: bytes, body: bytes = b"") -> Path:
    """Replace the weights of a policy by a header and bytes."""
    path.with_suffix(".safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def averaged_file(folder: Path) -> Path:
    """A policy of PruneToBudget that averages three networks."""
    path = exported(folder, members=3)
    arrays = load_file(path.with_suffix(".safetensors"))
    return with_tensors(path, **{f"_{name.replace('.', '_')}": np.stack([x] * 3) for name, x in arrays.items()})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["_0_weight", "_1_bias"])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_their_tensor(
    tmp_path: Path, name: str, value: float
) -> None:
    path = exported(tmp_path)
    tensor = name.strip("_").replace("_", ".")
    array = load_file(path.with_suffix(".safetensors"))[tensor]
    array.flat[-1] = value
    message = refusal(with_tensors(path, **{name: array}))
    assert f"policy.safetensors: tensor {tensor} has values that are not finite" in message


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "int32", "uint8", "bool"])
def test_weights_of_another_type_than_float32_are_refused(tmp_path: Path, dtype: str) -> None:
    path = exported(tmp_path)
    array = load_file(path.with_suffix(".safetensors"))["0.weight"].astype(dtype)
    assert "tensor 0.weight is 'F64'" in refusal(with_tensors(path, _0_weight=array.astype(np.float64)))
    assert "tensor 0.weight is" in refusal(with_tensors(path, _0_weight=array))


def test_a_tensor_that_the_layers_do_not_name_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    shape = load_file(path.with_suffix(".safetensors"))["0.weight"].shape
    assert "tensor 0.weight has shape" in refusal(with_tensors(path, _0_weight=np.zeros(shape[::-1], np.float32)))
    exported(tmp_path)
    assert "unknown tensor '2.weight'" in refusal(with_tensors(path, _2_weight=np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "JSON|Expecting"),
        (b"[1]", "not a table"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"0.weight": 1}', "no tensor 0.weight"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff\xfe", "utf-8"),
        (b'{"0.weight": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 8]}}', "has shape"),
        (b'{"0.weight": {"dtype": "F32", "shape": NaN, "data_offsets": [0, 8]}}', "not a JSON number"),
        (b" " * (2 * 2**20), "a header of 2,097,152 bytes"),
    ],
)
def test_a_header_is_checked_before_anything_it_names_is_loaded(tmp_path: Path, header: bytes, message: str) -> None:
    assert re.search(message, refusal(with_header(exported(tmp_path), header)))


def test_offsets_that_do_not_fit_the_bytes_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    data = path.with_suffix(".safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for offsets in ([0, 4], [0, 2**60], [-4, 0], [8, 0], "no"):
        header["0.weight"]["data_offsets"] = offsets
        assert "policy.safetensors" in refusal(with_header(path, json.dumps(header).encode(), data[8 + length :]))


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    for length in (2**63, 2**40, 100_000):
        path.with_suffix(".safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        assert "cut short" in refusal(path)


def test_files_above_their_limits_are_refused_unread(tmp_path: Path) -> None:
    path = exported(tmp_path)
    os.truncate(path.with_suffix(".safetensors"), 2 * MAX_WEIGHT_BYTES)
    assert "the limit" in refusal(path)
    os.truncate(path, MAX_JSON_BYTES + 1)
    assert "policy.json has more than" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is not a file" in refusal(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": []}, "layers is"),
        ({"layers": [[7, 17.0], [6, 7]]}, "layers is"),
        ({"layers": [[True, 17], [6, 7]]}, "layers is"),
        ({"layers": [[0, 17], [6, 0]]}, "layers is"),
        ({"layers": [[65_536, 65_536]] * 2}, "bytes of weights; at most"),
        ({"layers": [[1, 1]] * 10_000}, "layers is"),
        ({"layers": "many"}, "layers is 'many'"),
        ({"activation": ["relu"]}, "activation is"),
        ({"task": None}, "task is None"),
        ({"model": {"a": 1}}, "model is"),
        ({"model": "two\nlines"}, "model is"),
        ({"observation": "none"}, "observation is"),
        ({"observation": [1, 2]}, "observation is"),
        ({"observation": [{"name": "x"}]}, "observation is"),
        ({"actions": [1]}, "actions is"),
        ({"environment": []}, "environment is"),
        ({"environment": {"hide": [1]}}, "environment.hide is"),
        ({"environment": {"scores": "yes"}}, "environment.scores is"),
        ({"environment": {"sequence": 1e300}}, "environment.sequence is"),
        ({"scores": [1e300]}, "scores is"),
        ({"scores": "none"}, "scores is"),
        ({"tick_s": -1.0}, "tick_s is"),
        ({"plans": {"drops": 0}}, "plans.drops is"),
        ({"plans": {"dropz": [0]}}, r"unknown key plans.'dropz'; did you mean 'drops'"),
        ({"plans": {"drops": [0] * 2000, "admits": [None] * 2000, "low_layers": [0] * 2000}}, "8000000000 plans"),
        ({"training": 3}, "training is 3"),
        ({"slo": {"ttft": 2.0}}, "unknown key slo.'ttft'; did you mean 'ttft_s'"),
        ({"slo": {"e2e_s": -1.0}}, "slo.e2e_s is -1.0"),
        ({"slo": {"side": "server"}}, "slo.side is 'server'; it must be engine or client"),
        ({"members": 1}, "members is 1; it must be a whole number from 2 to 64"),
        ({"members": 65}, "members is 65"),
        ({"members": True}, "members is True"),
        ({"members": 2}, "tensor 0.weight has shape [7, 17], expected [2, 7, 17]"),
        ({"trainings": [{}, {}]}, "trainings lists 2, but the policy has 1 members"),
        ({"trainings": [{"seconds": "long"}]}, "trainings.0.seconds is 'long'"),
        ({"heads": [3]}, "heads is [3]"),
        ({"heads": [65_536, 2]}, "heads is [65536, 2]; it must be a pair"),
        ({"heads": [3, 2]}, "heads is [3, 2], which need 5 outputs; the last layer has 6"),
        ({"heads": [3, 3]}, "17 inputs and 9 actions, but its table has 17 entries and 6"),
        ({"heads": [3, 3], "plans": {"drops": [0, 1]}}, "plans lists 2 plans, but the network has 9 actions"),
        ({"plans": {"waits": [0.0]}}, "plans.waits is [0.0]"),
        ({"layerz": 1}, "unknown key 'layerz'; did you mean 'layers'"),
    ],
)
def test_json_with_a_wrong_or_unknown_key_is_refused_by_the_name_of_the_key(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    assert message in refusal(exported(tmp_path, **changed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1]", "not a table of keys"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
        ("{}", "there is no key 'task'"),
        ('{"task": NaN}', "NaN is not a JSON number"),
        ('{"task": "a", "task": "b"}', "twice"),
    ],
)
def test_text_that_is_no_policy_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = exported(tmp_path)
    path.write_text(text, encoding="utf-8")
    assert message in refusal(path)


def test_json_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    path.write_bytes(path.read_text().encode("utf-16"))
    assert "utf-8" in refusal(path)


def test_a_number_too_large_for_a_float_is_not_finite_and_refused(tmp_path: Path) -> None:
    assert strict_json("[1e999]") == [float("inf")]
    path = exported(tmp_path, scores=[0.0])
    path.write_text(path.read_text().replace('"scores": [0.0]', '"scores": [1e999]'))
    assert "scores is [inf]" in refusal(path)


def test_a_network_whose_inputs_differ_from_its_own_table_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    about = json.loads(path.read_text())
    about["layers"] = [[7, 3], [5, 7]]
    path.write_text(json.dumps(about))
    arrays = {"0.weight": np.ones((7, 3)), "0.bias": np.ones(7), "1.weight": np.ones((5, 7)), "1.bias": np.ones(5)}
    save_file({name: array.astype(np.float32) for name, array in arrays.items()}, path.with_suffix(".safetensors"))
    assert "its network has 3 inputs and 5 actions, but its table has" in refusal(path)


def test_scores_for_another_number_of_blocks_are_refused(tmp_path: Path) -> None:
    rows = prune_table(TINY, scores=True).rows()
    changed = {"observation": rows, "environment": {"scores": True}, "scores": [0.5]}
    assert "scores for 6 blocks" in refusal(exported(tmp_path, **changed))


def test_an_average_with_one_bad_member_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    path = averaged_file(tmp_path)
    assert prune_network(TINY, path).network.members == 3
    array = load_file(path.with_suffix(".safetensors"))["1.weight"]
    array[2, 0, 0] = np.nan
    assert "tensor 1.weight has values that are not finite" in refusal(with_tensors(path, _1_weight=array))
    assert "tensor 1.weight has shape [2, 6, 7], expected [3, 6, 7]" in refusal(
        with_tensors(averaged_file(tmp_path), _1_weight=np.zeros((2, 6, 7), np.float32))
    )
    about = json.loads(averaged_file(tmp_path).read_text())
    path.write_text(json.dumps({**about, "layers": [[2048, 2048]] * 4, "members": 64}))
    assert "bytes of weights; at most" in refusal(path)


def test_a_serving_policy_without_plans_or_with_illegal_ones_is_refused(tmp_path: Path) -> None:
    shipped = read_learned("learned_serve_llama2", "ServeTrace")
    model = load_model("llama2_7b")
    target = tmp_path / "policy.json"
    target.with_suffix(".safetensors").write_bytes(shipped.path.with_suffix(".safetensors").read_bytes())
    plans = shipped.about["plans"]
    for changed in (None, {**plans, "order": ["XYZ1"] * 20}, {**plans, "low_bits": 5}, {**plans, "drops": [0, 4, 999]}):
        about = {key: value for key, value in shipped.about.items() if key != "plans"}
        if changed is not None:
            about["plans"] = changed
        target.write_text(json.dumps(about))
        with pytest.raises(RapLabError):
            learned_serve(PolicyContext(model=model), path=str(target))


@pytest.mark.parametrize(
    "name", ["learned_serve_llama2", "learned_prune_smollm2", "learned_cluster_llama2", "learned_roles_llama2"]
)
def test_every_shipped_policy_passes_the_checks(name: str) -> None:
    tasks = {"serve": "ServeTrace", "prune": "PruneToBudget", "cluster": "ServeCluster", "roles": "ServeRoles"}
    assert read_learned(name, tasks[name.split("_")[1]]).network.parameters > 1000


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "../conf", ""])
def test_a_name_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no learned policy"):
        read_learned(name, "ServeTrace")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_network_that_overflows_still_chooses_a_legal_action() -> None:
    top = np.float32(3e38)
    for sign in (1, -1):
        weights = (np.full((4, 2), sign * top), np.full((3, 4), top))
        network = Network(weights, (np.zeros(4, np.float32), np.zeros(3, np.float32)), "tanh")
        lone = Network((np.array([[top, -top], [top, top], [-top, -top]]),), (np.zeros(3, np.float32),))
        for legal in (np.array([False, True, False]), np.array([False, False, True])):
            for one in (network, lone):
                assert legal[one.act(np.full(2, 9.0, np.float32), legal)]


def test_every_option_of_a_table_of_plans_may_stand_in_the_file() -> None:
    """So a policy of any table that can be trained can be read."""
    assert set(PLANS) == set(inspect.signature(serve_actions).parameters) - {"model", "workspace_bytes"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kv_bits": [16, 8, "hidden"]},
        {"kv_bits": [16, "hidden"], "kv_compression": [None, {"method": "ada_kv", "percent": 70}], "streamed": [0, 4]},
        {"compute_bits": [16, 8], "kv_only": [0, 4], "ffn_width": [8, 7]},
    ],
)
def test_the_plans_of_a_file_are_counted_as_the_table_combines_them(more: dict[str, Any]) -> None:
    options = {"order": ["MHA20", "FFN3"], "drops": [0, 2], "waits": [1.0, None, 2.0], **more}
    assert _plan_count(options) == len(serve_actions(load_model("llama2_7b"), **options).plans)
