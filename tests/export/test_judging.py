"""Plans that are tried for a target."""

from unroll.export.judging import most_taken
from unroll.targets.checking import Verdict
from unroll.targets.uses import Row


def verdict(*operators: str) -> Verdict:
    rows = [Row(f"node{k}", operator, finding, "") for k, operator in enumerate(operators) for finding in "ab"]
    return Verdict("xnnpack", 99, tuple(rows))


def test_a_plan_of_which_most_is_taken_has_the_fewest_products_left_and_then_the_fewest_findings():
    loop = verdict("aten.addmm.default", "aten.lstm.input")
    cut, halved = verdict(*["aten.chunk.default"] * 7), verdict(*["aten.chunk.default"] * 5)
    assert most_taken({"loop": loop}) == ("loop", 2, 4)
    assert most_taken({"loop": loop, "cut": cut, "halved": halved}) == ("halved", 0, 10)
