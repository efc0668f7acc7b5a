"""The first charts of a comparison: held-out quality and exposure bias over training tokens."""

from matplotlib.figure import Figure

from understudy.report.learning_curves import learning_curves


def run(name, values, metric="eval_accuracy"):
    series = {"step": [0, 10, 20], "seconds": [0.0, 1.0, 2.0], "tokens": [0.0, 1000.0, 2000.0], "value": values}
    return {"name": name, "series": {metric: series}}


def content(*runs, teacher=None):
    references = {"teacher": {"metrics": {"greedy": {"accuracy": teacher}}}} if teacher else {}
    return {"runs": list(runs), "comparison": {"quality": [("greedy", "accuracy")], "references": references}}


def labels_of(chart):
    axes = Figure().add_axes((0.1, 0.1, 0.6, 0.8))
    chart.panels[0].draw(axes)
    return [text.get_text() for text in axes.texts], axes


def test_every_seed_is_a_line_and_the_best_recipe_is_first():
    runs = run("kd", [0.1, 0.1, 0.2]), run("gkd", [0.1, 0.2, 0.4]), run("gkd", [0.1, 0.2, 0.7])
    [chart] = learning_curves(content(*runs, teacher=0.98))
    assert chart.title == "Accuracy over training tokens"
    assert chart.panels[0].about == "gkd 55.0 % at the end; kd 20.0 % at the end; teacher 98.0 %."
    texts, axes = labels_of(chart)
    assert sorted(texts) == ["gkd 55.0 %", "kd 20.0 %", "teacher 98.0 %"]
    assert [list(line.get_xdata()) for line in axes.lines[:3]] == [[0, 1000, 2000]] * 3
    assert axes.get_ylim()[0] <= 0


def test_a_teacher_far_above_is_named_and_not_drawn():
    [chart] = learning_curves(content(run("kd", [0.1, 0.1, 0.1]), run("gkd", [0.1, 0.1, 0.2]), teacher=0.98))
    assert "teacher 98.0 %" in chart.panels[0].about
    assert chart.about == "on held-out data; the teacher is at 98.0 %"
    assert not any("teacher" in text for text in labels_of(chart)[0])


def test_without_the_metric_of_the_comparison_another_one_is_drawn():
    runs = [run(name, [10.0, None, value], "eval_rouge_l") for name, value in (("kd", 20.0), ("gkd", 30.0))]
    [chart] = learning_curves({"runs": runs, "comparison": None})
    assert chart.title == "Rouge l over training tokens"
    assert chart.panels[0].about == "gkd 30.00 at the end; kd 20.00 at the end."


def test_one_variant_or_one_point_has_no_such_chart():
    assert learning_curves(content(run("gkd", [0.1, 0.2, 0.4]))) == []
    assert learning_curves(content(run("gkd", [0.1, 0.2, 0.4]), run("kd", [None, None, 0.4]))) == []


def test_exposure_bias_during_training_is_a_line_for_each_recipe_and_the_least_is_first():
    seeds = run("kd", [30.0, 60.0, 40.0]), run("kd", [30.0, 40.0, 20.0]), run("promptkd", [30.0, 10.0, 20.0])
    runs = [{**each, "series": {"eval_exposure_bias": each["series"]["eval_accuracy"]}} for each in seeds]
    [chart] = learning_curves({"runs": runs, "comparison": None})
    assert chart.title == "Exposure bias over training tokens"
    about = "Mean over training, after the start, and standard deviation over seeds: "
    assert chart.panels[0].about == about + "promptkd 15.00; kd 40.00 ± 14.14."
    texts, axes = labels_of(chart)
    assert sorted(texts) == ["kd 40.00", "promptkd 15.00"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[30, 10, 20], [30, 50, 30]]
