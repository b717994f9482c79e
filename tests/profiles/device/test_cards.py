"""The cards that --gpu names: opened together, alone visible to CUDA, or refused."""

from __future__ import annotations

import os

import pytest

from tests.profiles.device.standin import Standin
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.cards import ORDER, VISIBLE, open_cards, parse_indices, visible_alone

OPEN = "import os\nfrom voltana.profiles.device.cards import open_cards\n"


@pytest.mark.parametrize("text", ["", "a", "0,", "0,0", "0, 0", "0,00", "-1", "0;1"])
def test_anything_but_distinct_indices_is_refused(text: str) -> None:
    with pytest.raises(VoltanaError, match=r"--gpu must be distinct NVML indices"):
        parse_indices(text)


def test_cuda_sees_the_named_cards_alone_in_their_order(standin: Standin) -> None:
    """Numbered as NVML does, not by CUDA's own order; processes started there inherit it."""
    standin["num_gpus"] = 3
    standin.env[VISIBLE] = "0"
    out = standin.run(
        OPEN + "import subprocess, sys\n"
        "with open_cards('2,0', None) as cards:\n"
        "    print([card.identity.index for card in cards], sum(c.power_w() for c in cards))\n"
        f'    code = \'import os; print(os.environ["{VISIBLE}"], os.environ["{ORDER}"])\'\n'
        "    print(subprocess.check_output([sys.executable, '-c', code], text=True), end='')\n"
        f"print(os.environ['{VISIBLE}'])"
    )
    assert out.splitlines() == ["[2, 0] 500.0", "2,0 PCI_BUS_ID", "0"]


def test_what_was_not_set_is_unset_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    with visible_alone([1]):
        assert os.environ[VISIBLE] == "1"
    assert VISIBLE not in os.environ


def test_a_stated_power_needs_no_card_and_hides_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    with open_cards("0", 70.0) as cards:
        assert [card.power_w() for card in cards] == [70.0]
        assert VISIBLE not in os.environ


@pytest.mark.parametrize(("mode", "is_refused"), [(0, False), (1, False), (2, True)])
def test_a_partitioned_card_is_refused(standin: Standin, mode: int, *, is_refused: bool) -> None:
    """0: a card without MIG, 1: MIG off, 2: on."""
    standin["mig_mode"] = mode
    out = standin.run(
        OPEN + "from voltana.profiles.common.errors import VoltanaError\n"
        "try:\n    with open_cards('0', None):\n        print('open')\n"
        "except VoltanaError as e:\n    print(e)"
    )
    assert ("in MIG mode" in out) is is_refused
    assert "\n" not in out
