from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq.core import Loss, Recipe, RecipeError, check_counts, diff, needs, show, walk
from zsq.losses import BNStatistics, CrossEntropy, ImageStatistics
from zsq.methods import BASELINES, METHODS
from zsq.synthesis import GaussianPixels, OptimizeImages, Plateau, UniformLabels, UniformPixels

EVERY = {**METHODS, **BASELINES}
RECIPES = {
    f"{name}-{preset}": method.preset(preset) for name, method in EVERY.items() for preset in ("paper", *method.presets)
}


@dataclass(frozen=True, kw_only=True)
class Salt(Recipe):
    grams: float = 1.0
    kind: Literal["sea", "rock"] = "sea"
    needs = frozenset({"water"})


@dataclass(frozen=True, kw_only=True)
class Pepper(Recipe):
    grains: int = 3
    fresh: bool = True
    mills: tuple[int, ...] = (1, 2)
    size: tuple[float, float] = (0.1, 0.2)
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Soup(Recipe):
    spice: Salt | Pepper = Salt()
    steps: tuple[Recipe, ...] = (Salt(), Pepper())
    servings: int = 4
    anything: Any = 0

    def __post_init__(self) -> None:
        check_counts(self, "servings")


SOUP = Soup()


def refusal(changes: dict[str, Any], recipe: Recipe = SOUP) -> str:
    with pytest.raises(RecipeError) as error:
        recipe.override(changes)
    return str(error.value)


def test_override_replaces_values_at_any_depth():
    changed = SOUP.override({"spice.grams": 2.5, "steps.pepper.grains": 7, "servings": 2})
    assert changed == Soup(spice=Salt(grams=2.5), steps=(Salt(), Pepper(grains=7)), servings=2)
    assert Soup() == SOUP  # the original never changes


def test_override_replaces_an_ingredient():
    assert SOUP.override({"spice": Pepper()}).spice == Pepper()
    assert SOUP.override({"spice": Pepper(), "spice.grains": 9}).spice.grains == 9


def test_a_whole_number_is_welcome_where_a_number_is_and_becomes_one():
    grams = SOUP.override({"spice.grams": 2}).spice.grams
    assert (grams, type(grams)) == (2.0, float)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("servngs", "no 'servngs' in 'servngs': Soup has spice, steps, servings, anything (did you mean 'servings'?)"),
        ("spice.gram", "no 'gram' in 'spice.gram': Salt has grams, kind (did you mean 'grams'?)"),
        ("steps.sugar.grams", "no 'sugar' in 'steps.sugar.grams': the list has salt, pepper"),
        ("servings.more", "no 'more' in 'servings.more': int has no parts"),
        ("", "no '' in '': Soup has spice, steps, servings, anything"),
    ],
)
def test_a_wrong_path_lists_what_exists(path, message):
    assert refusal({path: 1}) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("servings", 1.5, "servings must be a whole number, got 1.5"),
        ("servings", True, "servings must be a whole number, got True"),
        ("spice.grams", "much", "spice.grams must be a number, got 'much'"),
        ("spice.grams", False, "spice.grams must be a number, got False"),
        ("spice.kind", "table", "spice.kind must be one of 'sea', 'rock', got 'table'"),
        ("steps.pepper.fresh", 1, "steps.pepper.fresh must be True or False, got 1"),
        ("steps.pepper.note", 4, "steps.pepper.note must be text or None, got 4"),
        ("steps.pepper.mills", (1, "x"), "steps.pepper.mills must be a tuple (a whole number, ...), got (1, 'x')"),
        ("steps.pepper.size", (1.0,), "steps.pepper.size must be a tuple (a number, a number), got (1.0,)"),
        ("steps.pepper", Salt(), "steps.pepper must be Pepper, got Salt(grams=1.0, kind='sea')"),
        ("spice", 3, "spice must be Salt or Pepper, got 3"),
    ],
)
def test_a_wrong_type_says_what_fits(path, value, message):
    assert refusal({path: value}) == message


def test_a_wrong_range_says_what_was_found():
    assert refusal({"servings": 0}) == "Soup.servings must be at least 1, got 0"


def test_two_of_one_class_in_a_tuple_are_refused():
    with pytest.raises(RecipeError, match="cannot be told apart"):
        show(replace(SOUP, steps=(Salt(), Salt())))


def test_leaves_are_the_plain_values_in_order():
    assert [path for path, _ in SOUP.leaves()] == [
        *("spice.grams", "spice.kind", "steps.salt.grams", "steps.salt.kind", "steps.pepper.grains"),
        *("steps.pepper.fresh", "steps.pepper.mills", "steps.pepper.size", "steps.pepper.note", "servings", "anything"),
    ]


def test_show_names_classes_and_values():
    assert show(Soup(steps=(Pepper(),))).splitlines() == [
        "spice = Salt",
        "spice.grams = 1.0",
        "spice.kind = 'sea'",
        "steps.pepper = Pepper",
        "steps.pepper.grains = 3",
        "steps.pepper.fresh = True",
        "steps.pepper.mills = (1, 2)",
        "steps.pepper.size = (0.1, 0.2)",
        "steps.pepper.note = None",
        "servings = 4",
        "anything = 0",
    ]


def test_diff_shows_what_changed_and_nothing_else():
    assert diff(SOUP, SOUP) == ""
    assert diff(SOUP, SOUP.override({"servings": 2})) == "- servings = 4\n+ servings = 2"
    assert diff(SOUP, SOUP.override({"spice": Pepper()})).startswith("- spice = Salt\n- spice.grams = 1.0\n")


def test_needs_are_collected_from_all_depths():
    assert needs(SOUP) == {"water"}
    assert needs(Pepper()) == frozenset()
    assert [type(each).__name__ for each in walk(SOUP)] == ["Soup", "Salt", "Salt", "Pepper"]


def test_terms_of_an_objective_are_reached_by_name():
    images = OptimizeImages(loss=CrossEntropy() + 0.1 * BNStatistics(), labels=UniformLabels())
    changed = images.override({"loss.bn_statistics.weight": 2, "loss.cross_entropy": ImageStatistics(weight=3.0)})
    assert str(changed.loss) == "3 * ImageStatistics + 2 * BNStatistics"
    assert "CrossEntropy" not in str(changed.override({"loss": BNStatistics()}).loss)
    message = refusal({"loss.bn.weight": 2}, images)
    assert message.startswith("no 'bn' in 'loss.bn.weight': Objective has cross_entropy, bn_statistics")
    assert refusal({"loss.bn_statistics": Salt()}, images).startswith("loss.bn_statistics must be Loss, got Salt(")


def test_an_optional_ingredient_can_be_taken_away_and_given_back():
    images = OptimizeImages(loss=BNStatistics())
    without = images.override({"schedule": None})
    assert without.schedule is None
    assert without.override({"schedule": Plateau()}) == images
    assert images.override({"pixels": UniformPixels()}).override({"pixels": GaussianPixels()}) == images
    assert "Plateau or WarmUpCosine or None" in refusal({"schedule": 3}, images)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_leaves_override_to_the_same_recipe(recipe):
    assert recipe.override(dict(recipe.leaves())) == recipe
    assert diff(recipe, recipe.override(dict(recipe.leaves()))) == ""


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_leaves_of_shipped_recipes_refuse_another_type(recipe):
    for path, _ in recipe.leaves():
        with pytest.raises(RecipeError, match="must be"):
            recipe.override({path: object()})


@given(st.sampled_from(list(RECIPES.values())), st.data())
def test_one_changed_number_is_one_changed_line(recipe, data):
    numbers = [(path, value) for path, value in recipe.leaves() if isinstance(value, int) and value > 32]
    if not numbers:
        return
    path, value = data.draw(st.sampled_from(numbers))
    changed = recipe.override({path: value + 1})
    assert diff(recipe, changed) == f"- {path} = {value}\n+ {path} = {value + 1}"
    assert changed.override({path: value}) == recipe


def test_recipes_are_frozen_and_take_names_only():
    with pytest.raises(AttributeError):
        SOUP.servings = 3
    with pytest.raises(TypeError):
        Loss(1.0)


def test_a_learning_rate_must_be_a_positive_number():
    for value in (-0.5, float("nan")):
        with pytest.raises(RecipeError, match=r"OptimizeImages.lr must be positive, got"):
            METHODS["zeroq"].override({"synthesizer.lr": value})
    with pytest.raises(RecipeError, match="cannot be negative"):
        METHODS["zeroq"].override({"synthesizer.schedule.min_lr": -1.0})
    with pytest.raises(RecipeError, match="cannot be negative"):
        METHODS["genie"].override({"quantizer.reconstruct_blocks.lr_weight_scale": -1e-4})
