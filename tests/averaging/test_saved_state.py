"""The averages on disk: written by one run, opened by another."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import swaft
from swaft.averaging import state
from swaft.averaging.layout import Fragment
from swaft.averaging.state import RankFiles, write_rank
from swaft.errors import AveragingError, StateError
from swaft.storage import TensorFile

pytestmark = pytest.mark.unit

STEPS = 10
RULES = {
    "swa": swaft.SWA(start=0.3),
    "lawa": swaft.LAWA(start=2, last=3),
    "ema": swaft.EMA(start=1, decay=0.5),
    "windows": swaft.Windows(start=1, blocks=3),
    "bema": swaft.BEMA(start=0, every=2),
}


def start(rule=RULES, *, width=5, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, swaft.WeightAverager(model, optimizer, rule=rule, total_steps=STEPS, **options)


def train(model, optimizer, averager, first, last):
    for step in range(first, last):
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.step()


def half_way(folder: Path, at: int, **options) -> dict:
    """Train, save, and return the weights that belong to the state."""
    model, optimizer, averager = start(**options)
    train(model, optimizer, averager, 0, at)
    averager.save_state(folder)
    return model.state_dict()


def lanes(averager) -> dict[str, list[torch.Tensor]]:
    averager.wait()
    return {
        name: [
            part
            for lane in each.held().values()
            for part in (lane.mean, lane.compensation)
            if part is not None
        ]
        for name, each in averager._averages.lanes.items()
    }


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6, STEPS])
@pytest.mark.parametrize("precision", ["compensated", "plain"])
def test_an_average_that_was_saved_goes_on_as_one_that_was_not(tmp_path, at, precision):
    whole = start(precision=precision)
    train(*whole, 0, STEPS)
    weights = half_way(tmp_path / "state", at, precision=precision)
    model, optimizer, averager = start(precision=precision)
    model.load_state_dict(weights)
    averager.load_state(tmp_path / "state")
    assert averager.applied_steps == at
    train(model, optimizer, averager, at, STEPS)
    expected, found = lanes(whole[2]), lanes(averager)
    assert all(averager.count(name) == whole[2].count(name) for name in RULES)
    for name, vectors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(vectors, found[name], strict=True)), name


def test_finished_blocks_go_to_disk_again(tmp_path, mapped_files):
    weights = half_way(tmp_path / "state", 8, spill_dir=tmp_path / "spill")
    model, _, averager = start(spill_dir=tmp_path / "other")
    model.load_state_dict(weights)
    averager.load_state(tmp_path / "state")
    assert mapped_files(tmp_path / "other")


def test_a_state_beside_other_weights_is_refused_unless_that_is_meant(tmp_path):
    half_way(tmp_path / "state", 6)
    _, _, averager = start()
    with pytest.raises(StateError, match=r"saved with other weights, after 6 optimizer steps"):
        averager.load_state(tmp_path / "state")
    assert averager.count("swa") == 0
    averager.load_state(tmp_path / "state", same_weights=False)
    assert averager.count("swa") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": swaft.SWA(start=0.3)}, "holds the rules swa: SWA"),
        ({"rule": RULES | {"swa": swaft.SWA(start=0.4)}}, r"this run averages by swa: SWA\(start=0.4"),
        (
            {"precision": "plain"},
            "precision is 'compensated' there and 'plain' in this run; set averaging.precision",
        ),
        ({"width": 6}, r"average of another model: '0.weight' has shape \[5, 7\] in it and \[6, 7\] here"),
    ],
)
def test_the_state_of_another_run_is_refused_and_changes_nothing(tmp_path, options, message):
    half_way(tmp_path / "state", 6)
    _, _, averager = start(**options)
    with pytest.raises(StateError, match=message):
        averager.load_state(tmp_path / "state", same_weights=False)
    assert averager.num_averaged == 0


def test_a_folder_that_holds_anything_is_never_written_to(tmp_path):
    (tmp_path / "note").write_text("mine")
    _, _, averager = start()
    with pytest.raises(StateError, match=r"holds files already.*overwrite=True"):
        averager.save_state(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_a_state_takes_the_place_of_an_older_one_where_that_is_asked_for(tmp_path):
    model, optimizer, averager = start()
    for at in (4, 6):
        train(model, optimizer, averager, averager.applied_steps, at)
        averager.save_state(tmp_path / "state", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    again, _, other = start()
    again.load_state_dict(model.state_dict())
    other.load_state(tmp_path / "state")
    assert other.applied_steps == 6


def test_a_checkpoint_of_accelerates_that_would_keep_one_ranks_averages_is_refused():
    _, _, averager = start()
    with pytest.raises(AveragingError, match=r"would hold those of one rank; expected .*register_averager"):
        Accelerator(cpu=True).register_for_checkpointing(averager)


def test_a_state_saved_inside_a_swap_is_that_of_the_live_weights(tmp_path):
    model, optimizer, averager = start(swaft.SWA(start=0.3))
    train(model, optimizer, averager, 0, 6)
    with averager.swapped_in():
        averager.save_state(tmp_path / "inside")
    averager.save_state(tmp_path / "outside")
    contents = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("inside", "outside")]
    assert contents[0] == contents[1]


def test_no_state_is_loaded_inside_a_swap(tmp_path):
    model, optimizer, averager = start(swaft.SWA(start=0.3))
    train(model, optimizer, averager, 0, 6)
    averager.save_state(tmp_path / "state")
    with averager.swapped_in(), pytest.raises(AveragingError, match="leave the swap first"):
        averager.load_state(tmp_path / "state")


@pytest.mark.parametrize("file", ["manifest.json", "COMPLETE", "rank-00000.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damage_is_named_and_the_average_is_as_it_was(tmp_path, file, damage):
    weights = half_way(tmp_path / "state", 6)
    path = tmp_path / "state" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x04
        path.write_bytes(content)
    model, optimizer, averager = start()
    model.load_state_dict(weights)
    with pytest.raises(StateError, match=str(tmp_path / "state")):
        averager.load_state(tmp_path / "state")
    model.load_state_dict(start()[0].state_dict())  # the weights of the first member
    train(model, optimizer, averager, 0, 2)
    assert averager.count("ema") == 2


def test_nothing_in_a_state_is_pickle(tmp_path):
    half_way(tmp_path / "state", 6)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["COMPLETE", "manifest.json", "rank-00000.safetensors"]


def make_ranks(folder: Path, cuts: list[list[tuple[str, int, int]]]) -> torch.Tensor:
    """Write a file for each rank; element i of parameter "a" holds i, of "b" 100 + i."""
    folder.mkdir()
    for rank, ranges in enumerate(cuts):
        base = {"a": 0.0, "b": 100.0}
        values = [torch.arange(base[n] + s, base[n] + e) for n, s, e in ranges]
        vector = torch.cat([torch.empty(0), *values])
        write_rank(folder, rank, [Fragment(n, s, e, 0, 0) for n, s, e in ranges], {"x": vector})
    return torch.cat([torch.arange(0.0, 9.0), torch.arange(100.0, 105.0)])


CUTS = {
    "one": [[("a", 0, 9), ("b", 0, 5)]],
    "two": [[("a", 0, 7)], [("a", 7, 9), ("b", 0, 5)]],
    "backwards": [[("b", 3, 5), ("a", 5, 9)], [], [("b", 0, 3), ("a", 0, 5)]],
    "crumbs": [[("a", i, i + 1)] for i in range(9)] + [[("b", i, i + 1)] for i in range(5)],
}


@pytest.mark.parametrize("before", CUTS)
@pytest.mark.parametrize("after", CUTS)
def test_elements_are_found_however_they_were_cut(tmp_path, before, after):
    make_ranks(tmp_path / "state", CUTS[before])
    files = sorted(path.name for path in (tmp_path / "state").iterdir())
    for ranges in CUTS[after]:
        vector = torch.full((sum(e - s for _, s, e in ranges),), -1.0)
        with RankFiles(tmp_path / "state", files) as saved:
            saved.read(ranges, {"x": vector})
        base = {"a": 0.0, "b": 100.0}
        expected = [torch.arange(base[n] + s, base[n] + e) for n, s, e in ranges]
        assert torch.equal(vector, torch.cat([torch.empty(0), *expected]))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([[("a", 0, 9)], [("b", 0, 4)]], "element 4 of 'b' is in no file"),
        ([[("a", 0, 6), ("a", 3, 6)], [("b", 0, 5)]], "is in more than one file"),
    ],
)
def test_elements_that_are_missing_or_there_twice_are_named(tmp_path, cuts, message):
    make_ranks(tmp_path / "state", cuts)
    files = sorted(path.name for path in (tmp_path / "state").iterdir())
    vector = torch.empty(14)
    with RankFiles(tmp_path / "state", files) as saved, pytest.raises(StateError, match=message):
        saved.read([("a", 0, 9), ("b", 0, 5)], {"x": vector})


def test_a_file_is_parsed_once_however_often_it_is_read_and_few_are_open_at_a_time(tmp_path, monkeypatch):
    expected = make_ranks(tmp_path / "state", CUTS["crumbs"])
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    parsed, open_now, most_open = [], set(), []
    ranges_of, open_file, close_file = state._ranges, TensorFile.__init__, TensorFile.close

    def opened(self: TensorFile, path: Path) -> None:
        open_file(self, path)
        open_now.add(path)
        most_open.append(len(open_now))

    def closed(self: TensorFile) -> None:
        close_file(self)
        open_now.discard(self.path)

    monkeypatch.setattr(state, "MOST_OPEN", 3)
    monkeypatch.setattr(state, "_ranges", lambda file: parsed.append(file.path) or ranges_of(file))
    monkeypatch.setattr(TensorFile, "__init__", opened)
    monkeypatch.setattr(TensorFile, "close", closed)
    with RankFiles(tmp_path / "state", names) as saved:
        for _ in range(2):
            for element in range(9):
                value = torch.empty(1)
                saved.read([("a", element, element + 1)], {"x": value})
                assert value == expected[element]
    assert len(parsed) == len(set(parsed)) == 9
    assert max(most_open) == 3 + 1  # the next is opened before the last is closed
    assert not open_now


def test_a_copied_state_is_as_good_as_the_first(tmp_path):
    weights = half_way(tmp_path / "state", 6)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    model, _, averager = start()
    model.load_state_dict(weights)
    averager.load_state(tmp_path / "copy")
    assert averager.count("swa") == 4


def test_the_order_in_which_rules_are_given_does_not_matter(tmp_path):
    weights = half_way(tmp_path / "state", 6)
    model, optimizer, averager = start(dict(reversed(RULES.items())))
    model.load_state_dict(weights)
    averager.load_state(tmp_path / "state")
    whole = start()
    train(*whole, 0, STEPS)
    train(model, optimizer, averager, 6, STEPS)
    expected, found = lanes(whole[2]), lanes(averager)
    assert all(torch.equal(a, b) for name in RULES for a, b in zip(expected[name], found[name], strict=True))


def test_a_state_that_was_saved_through_a_link_is_read_through_it(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    model, optimizer, averager = start()
    train(model, optimizer, averager, 0, 6)
    averager.save_state(tmp_path / "link", overwrite=True)
    averager.load_state(tmp_path / "link")
    assert averager.count("swa") == 4


def test_a_run_past_its_end_is_resumed_and_trained_on_as_the_refusals_say(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(7, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def attached(**options):
        return swaft.WeightAverager(model, optimizer, rule=swaft.EMA(decay=0.9), **options)

    unbroken = attached(total_steps=5)
    train(model, optimizer, unbroken, 0, 8)
    unbroken.save_state(tmp_path / "state")
    with pytest.raises(AveragingError, match=r"step 8.*past its total_steps=5.*first_step=0.*`load_state`"):
        attached(total_steps=5)
    with pytest.raises(
        StateError, match=r"total_steps is 5 there and 20.*as it was.*attach with first_step=0"
    ):
        attached(total_steps=20).load_state(tmp_path / "state")

    resumed = attached(total_steps=5, first_step=0)
    resumed.load_state(tmp_path / "state")
    assert (resumed.applied_steps, resumed.num_averaged) == (8, 9)
    for step in (8, 9):
        train(model, optimizer, unbroken, step, step + 1)
        resumed.step()
    assert torch.equal(resumed.shard(), unbroken.shard())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_averager_is_neither_pickled_nor_copied(copied):
    _, _, averager = start()
    with pytest.raises(
        AveragingError, match=r"a pickle or a copy would .* expected averager\.save_state\(path\)"
    ):
        copied(averager)
