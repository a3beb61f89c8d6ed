import dataclasses
import hashlib
import json

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import protocol

PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def make(preset="adm", **changes):
    fields = {
        "extractor_digest": PUBLISHED,
        "extractor_published": True,
        "quantiser": "round",
        "num": 50_000,
        "labels": "random",
        "sampling": {"guidance": 1.5, "sampler": "ddim", "steps": 250, "seed": 0},
    }
    rules = protocol.PRESETS.get(preset, protocol.PRESETS["adm"])
    fields |= {name: getattr(rules, name) for name in ("extractor", "tap", "resize")}
    return protocol.Protocol(preset=preset, **fields | changes)


def test_name_has_metric_number_preset_and_hash():
    p = make()
    canonical = json.dumps(p.to_json(), sort_keys=True, separators=(",", ":"))
    start = hashlib.sha256(canonical.encode()).hexdigest()[:8]
    assert p.metric_name("fid") == f"fid50k-adm-{start}"
    assert make(num=1234).metric_name("sfid").startswith("sfid1234-adm-")
    assert make("edm2").metric_name("fid").startswith("fd_dinov2-50k-edm2-")


def test_every_field_is_in_the_hash():
    base = make()
    other = {"num": 49_999, "labels": "balanced", "quantiser": "truncate"}
    changed = [dataclasses.replace(base, **{k: v}) for k, v in other.items()]
    changed += [make("torch_fidelity"), make(extractor_digest="0" * 64)]
    changed += [make(sampling={**base.sampling, k: 7}) for k in ("guidance", "steps", "reference")]
    custom = {"preset": "custom", "extractor": "x", "tap": "t", "resize": "r"}
    changed += [make(extractor_published=False)]
    for k in ("extractor", "tap", "resize"):
        changed += [dataclasses.replace(base, **custom | {k: "y"})]
    hashes = [p.hash() for p in [base, *changed]]
    assert len({*hashes}) == len(hashes)
    assert {f.name for f in dataclasses.fields(base)} == base.to_json().keys()


def test_hash_is_of_values_not_of_their_order_or_spelling():
    a = make(sampling={"guidance": 2.0, "steps": np.int64(20), "classes": (1, 2)})
    b = make(sampling={"classes": [1, 2], "steps": 20, "guidance": 2})
    assert a.hash() == b.hash() and a == b


@pytest.mark.parametrize("preset", sorted(protocol.PRESETS))
def test_unknown_weights_never_make_a_fid(preset):
    p = make(preset, extractor_digest="0" * 64, extractor_published=False)
    for metric in ("fid", "sfid", "rfid", "kid"):
        assert "fid" not in p.metric_name(metric) and "-custom-" in p.metric_name(metric)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": "sorted"}, "labels 'sorted'"),
        ({"num": 0}, "num 0 must"),
        ({"extractor_digest": "6726825d"}, "64 hex digits"),
        ({"sampling": {"guidance": float("nan")}}, "sampling.guidance nan must"),
        ({"sampling": {"model": object()}}, "sampling.model"),
    ],
)
def test_bad_fields_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_a_preset_keeps_its_conventions():
    with pytest.raises(InputError, match="resize 'pil_bicubic_aa': preset 'adm' is resize"):
        dataclasses.replace(make(), resize="pil_bicubic_aa")
    with pytest.raises(InputError, match="unknown; choose one of"):
        make("tensorflow")


def test_two_protocols_on_one_curve_are_refused(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text('{"job": "older, without a protocol", "figures": {"psnr": 30.0}}\n')
    first = make()
    protocol.append(path, first, {"fid": 3.6}, step=1)
    protocol.append(path, first, {"fid": 3.5}, step=2)
    other = make(sampling={**first.sampling, "steps": 50})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"line 2 has fid .*sampling.steps is 250 there but 50"):
        protocol.append(path, other, {"fid": 3.0, "new": 1.0})
    with pytest.raises(InputError, match=r"line 1 has psnr .*names no protocol"):
        protocol.append(path, first, {"psnr": 31.0})
    assert path.read_bytes() == before
    protocol.append(path, other, {other.metric_name("fid"): 3.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, None]
    assert lines[1]["protocol"] == first.to_json() and lines[1]["figures"] == {"fid": 3.6}


def test_a_torn_results_file_is_refused(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text('{"figures": {}}\n{"figures"')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        protocol.append(path, make(), {"fid": 1.0})
