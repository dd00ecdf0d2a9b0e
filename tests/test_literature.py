"""Published figures, and when they may stand beside ours."""

import pytest

from zsq.core import Bits
from zsq.literature import HOSTS, NETWORKS, PROTOCOLS, figures, published
from zsq.methods import METHODS

RESNET20 = "zoo:resnet20-cifar10"


def test_the_file_is_read_whole_and_makes_sense():
    found = figures()
    assert len(found) > 900
    assert {figure.confidence for figure in found} == {"high", "medium"}
    assert {figure.protocol for figure in found} == {"qat-lowbit-all", "ptq-8bit-ends", "minmax-ptq", "other"}
    assert all(0 < figure.value <= 100 and figure.source for figure in found)
    assert {(figure.dataset, figure.model) for figure in found} >= set(NETWORKS.values())


def test_drops_are_taken_from_the_float_value_of_the_same_source():
    # SynQ's table: 93.89 - 88.11 and 93.89 - 92.76
    assert published(RESNET20, "synq", "paper", "qat-lowbit-all") == {
        "W3A3": [(5.78, "SynQ (ICLR 2025) Table 1")],
        "W4A4": [(1.13, "SynQ (ICLR 2025) Table 1")],
    }


def test_sources_that_disagree_all_stand_there():
    drops = published(RESNET20, "hast", "paper", "qat-lowbit-all")["W3A3"]
    assert drops == [(5.69, "PLF (CVPR 2024) Table 1"), (7.55, "SynQ (ICLR 2025) Table 1")]


@pytest.mark.parametrize(("method", "drop"), [("ait", 2.66), ("ait+qimera", 2.66), ("gdfq", 3.64)])
def test_plug_ins_are_found_behind_their_host(method, drop):
    assert (drop, "AIT (CVPR 2022) result figure") in published(RESNET20, method, "paper", "qat-lowbit-all")["W4A4"]


@pytest.mark.parametrize(
    ("model", "method", "preset", "protocol"),
    [
        ("zoo:digits-resnet", "synq", "paper", "qat-lowbit-all"),
        (RESNET20, "synq", "paper", "ptq-8bit-ends"),
        (RESNET20, "nearest", "paper", "minmax-ptq"),
        (RESNET20, "of my own", "paper", "minmax-ptq"),
        (RESNET20, "synq", "mine", "qat-lowbit-all"),
        ("torchvision:resnet18", "squant", "paper", "minmax-ptq"),  # not where SQuant puts its quantizers
        ("torchvision:resnet18", "dfq", "paper", "per-tensor-all"),  # one that no paper shares
        ("torchvision:resnet18", "genie", "paper", "ptq-8bit-ends"),  # no source gives the float accuracy
    ],
)
def test_what_does_not_compare_is_not_shown(model, method, preset, protocol):
    assert published(model, method, preset, protocol) == {}


def test_each_protocol_here_has_one_in_the_literature():
    assert set(PROTOCOLS.values()) <= {figure.protocol for figure in figures()}
    assert published("torchvision:resnet18", "squant", "a8", "minmax-ptq-inputs")["W8A8"] == [
        (0.0, "SQuant (ICLR 2022) tables")
    ]
    assert "W4A8" in published("timm:deit_small_patch16_224", "psaq-vit", "paper", "minmax-vit")


def test_names_are_those_of_methods():
    called = {figure.method.lower() for figure in figures()}
    assert {HOSTS.get(name, name) for name in METHODS} <= called
    assert all(str(Bits.parse(figure.bits)) == figure.bits for figure in figures() if figure.bits[1] in "2345678")
