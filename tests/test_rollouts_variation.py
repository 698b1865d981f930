"""Variation: its grammar, its held-out fifth, and what it does to pictures but not to physics."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pvrpipe.rollouts.environments import Environment, make_environment
from pvrpipe.rollouts.variation import (
    BINS,
    FACTORS,
    HELD_OUT,
    PLAIN,
    PROTOCOL,
    Look,
    check_possible,
    columns_of,
    held_out,
    parse_variation,
)
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError

PICTURES = [factor for factor in FACTORS if factor != "size"]
SPLIT = [[7, 8, 9, 19], [3, 6, 9, 15], [5, 9, 14, 19]]


@pytest.fixture(scope="module")
def walker() -> Environment:
    return make_environment("dmc:walker-walk", size=64)


@pytest.fixture(scope="module")
def pendulum() -> Environment:
    return make_environment("dmc:pendulum-swingup", size=64)


def shown(environment: Environment, text: str, seed: int = 5) -> list[dict]:
    """Three rows of the episode of a seed in a look."""
    variation = parse_variation(text).members[0]
    first = environment.reset(seed, variation.draw(seed, environment.factors))
    actions = np.linspace(-0.5, 0.5, 2 * len(environment.action_low), dtype=np.float32).reshape(2, -1)
    return [first, *(environment.step(action) for action in actions)]  # type: ignore[list-item]


def test_the_canonical_text_is_read_back_to_itself() -> None:
    text = str(parse_variation("id:3, lighting=0.50+camera=0.3:1"))
    assert text == "id:0.75,camera=0.3+lighting=0.5:0.25"
    assert str(parse_variation(text)) == text
    assert str(parse_variation("none")) == "none"


def test_a_fifth_of_all_values_is_held_out_and_the_sides_never_meet() -> None:
    """Drawn a thousand times, each value of ``ood`` is in a held-out bin and none of ``id`` is; both reach all bins."""
    for name, most in (("background_hue", None), ("object_hue", None), ("size", 0.3)):
        assert len(held_out(name)) == HELD_OUT == BINS // 5
        bins = {}
        for side in ("id", "ood"):
            variation = parse_variation(side).members[0]
            values = np.array([variation.draw(seed, FACTORS)[name] for seed in range(1000)])
            shares = values if most is None else (values / most + 1) / 2
            bins[side] = set(np.floor(shares * BINS).astype(int).tolist())
        assert bins["ood"] == held_out(name)
        assert bins["id"] == set(range(BINS)) - held_out(name)
    assert held_out("background_hue") != held_out("object_hue")


def test_the_split_never_changes() -> None:
    """Stores of different years must agree on what was held out."""
    assert [sorted(held_out(name)) for name in ("background_hue", "object_hue", "size")] == SPLIT


def test_sizes_are_those_of_the_study() -> None:
    sides = [parse_variation(side).members[0] for side in ("id", "ood")]
    sizes = [1 + side.draw(seed, FACTORS)["size"] for side in sides for seed in range(1000)]
    assert 0.7 <= min(sizes) < 0.72
    assert 1.28 < max(sizes) <= 1.3


@pytest.mark.parametrize("factor", FACTORS)
def test_a_severity_is_how_much_and_the_seed_is_which_way(factor: str) -> None:
    """The strength of a factor is the same in every episode and grows with its severity."""
    for severity in (0.25, 0.5, 1.0):
        variation = parse_variation(f"{factor}={severity}").members[0]
        looks = [variation.draw(seed, FACTORS) for seed in range(20)]
        shares = []
        for look in looks:
            parts = [look[name] / most for name, most, _ in FACTORS[factor] if not name.endswith("_hue")]
            shares.append(np.hypot(*parts) if len(parts) == 2 else abs(parts[0]))
        expected = max(1, round(6 * severity)) / 6 if factor == "distractors" else severity
        assert shares == pytest.approx([expected] * 20)
    assert variation.distribution == "ood"


@pytest.mark.parametrize("factor", PICTURES)
def test_a_picture_changes_and_the_physics_does_not(walker: Environment, factor: str) -> None:
    plain, varied = shown(walker, "none"), shown(walker, f"{factor}=1")
    for a, b in zip(plain, varied, strict=True):
        assert np.array_equal(a["physics"], b["physics"])
        assert np.array_equal(a["state"], b["state"])
        assert a["reward"] == b["reward"]
        assert np.abs(a["frame"].astype(int) - b["frame"]).mean() > 0.5


@pytest.mark.parametrize(
    "name", [name for values in FACTORS.values() for name, _, _ in values if "_hue" not in name]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_every_value_is_seen_by_itself(pendulum: Environment, name: str, sign: int) -> None:
    """Also under a lamp that hangs straight above, which a turn about the vertical would leave where it is."""
    most = {name: most for values in FACTORS.values() for name, most, _ in values}[name]
    if sign < 0 and name not in ("size", "camera_azimuth", "fov", "light_intensity", "light_tilt"):
        return  # is never below 0
    plain = pendulum.reset(5)["frame"].astype(int)
    assert np.abs(plain - pendulum.reset(5, Look({name: sign * most}, seed=1))["frame"]).mean() > 0.5


@pytest.mark.parametrize("text", ["camera=1", "lighting=1", "distractors=1", "camera=0.5+lighting=0.5"])
def test_what_follows_a_body_goes_on_following_it_in_any_look(walker: Environment, text: str) -> None:
    """A walker that has walked 30 m is seen from where it was seen when it began, and as bright."""
    look = parse_variation(text).members[0].draw(5, FACTORS)
    first = walker.reset(5, Look({**look.values, "object_tint": 1.0}, look.seed))  # red; the floor is not
    far = first["physics"].copy()
    far[2] += 30  # time, height, how far
    walker.restore(far, row=1)  # type: ignore[attr-defined]
    near_by, far_off = (frame.astype(int) for frame in (first["frame"], walker.observe()["frame"]))  # type: ignore[attr-defined]
    seen = near_by[..., 0] > 2 * near_by[..., 2] + 30
    assert 30 < seen.sum() < seen.size / 2
    assert np.abs(near_by - far_off)[seen].mean() < 3


def test_sizes_change_what_moves_and_go_back(walker: Environment) -> None:
    plain, small, again = (shown(walker, text) for text in ("none", "size=1", "none"))
    assert np.abs(plain[0]["frame"].astype(int) - small[0]["frame"]).mean() > 0.5
    assert all(np.array_equal(a["frame"], b["frame"]) for a, b in zip(plain, again, strict=True))
    falls = []
    for text in ("none", "size=1"):
        shown(walker, text)
        falls.append([walker.step(np.zeros(6, np.float32)) for _ in range(25)][-1]["physics"])
    assert not np.array_equal(*falls), "feet of another size touch the ground elsewhere"


@pytest.mark.parametrize("text", ["id", "ood", "+".join(f"{name}=0.5" for name in FACTORS)])
def test_a_look_follows_from_its_seed(walker: Environment, text: str) -> None:
    first, other, again = shown(walker, text), shown(walker, text, seed=6), shown(walker, text)
    assert all(np.array_equal(a["frame"], b["frame"]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0]["frame"], other[0]["frame"])
    plain = shown(walker, "none")
    fresh = shown(make_environment("dmc:walker-walk", size=64), "none")
    assert all(np.array_equal(a["frame"], b["frame"]) for a, b in zip(plain, fresh, strict=True))


def test_patterns_move_and_noise_is_new_at_every_row(walker: Environment) -> None:
    """Held still, only what a moving background and a sensor add changes from row to row."""
    for text, changes in (
        ("texture=1", False),
        ("video=1", True),
        ("noise=1", True),
        ("sensor_noise=1", True),
    ):
        first = walker.reset(5, parse_variation(text).members[0].draw(5, walker.factors))
        walker.restore(first["physics"], row=1)  # type: ignore[attr-defined]
        later = walker.observe()["frame"]  # type: ignore[attr-defined]
        assert np.array_equal(first["frame"], later) != changes, text


def test_columns_are_those_of_all_members_that_the_environment_can_vary() -> None:
    mixture = parse_variation("none,id,fov=0.5")
    assert columns_of(mixture, FACTORS) == (
        "background_hue", "background_tint", "object_hue", "object_tint", "size", "fov",
    )  # fmt: skip
    assert columns_of(mixture, {"fov"}) == ("fov",)
    assert not PLAIN


def test_shares_are_dealt_like_those_of_policies() -> None:
    dealt = Counter(v.label for v in parse_variation("id:0.8,ood:0.2").assign(10, [0, 1]))
    assert dealt == {"id": 8, "ood": 2}


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("camer=0.3", UnknownNameError, "camera"),
        ("ood2", UnknownNameError, "ood"),
        ("", UnknownNameError, "none"),
        ("camera=0", InvalidValueError, "severity '0'"),
        ("camera=1.5", InvalidValueError, "up to 1"),
        ("camera=x", InvalidValueError, "severity 'x'"),
        ("camera=0.1+camera=0.2", InvalidValueError, "once"),
        ("id,id", InvalidValueError, "twice"),
        ("id:0", InvalidValueError, "weight '0'"),
    ],
)
def test_bad_variations_are_one_line_that_helps(text: str, kind: type[Exception], word: str) -> None:
    with pytest.raises(kind, match=word) as caught:
        parse_variation(text)
    assert "\n" not in str(caught.value)


def test_what_an_environment_cannot_vary_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"gym:X cannot vary camera .*it can vary: sensor_noise"):
        check_possible(parse_variation("camera=0.3"), "gym:X", {"sensor_noise"})
    with pytest.raises(InvalidValueError, match="cannot vary background, colour, size"):
        check_possible(parse_variation("none,id"), "gym:X", {"sensor_noise"})
    check_possible(parse_variation("id"), "miniworld:X", {PROTOCOL[1]})  # the protocol, as far as it goes
