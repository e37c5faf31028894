"""Task metrics of a bundle: the same as through the model by hand, and the baselines are ranked on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_gym.bundle import Bundle
from dsa_gym.domains import take
from dsa_gym.experiments.task_metrics import task_metrics
from dsa_gym.problem import GatingProblem


def test_personal_row_is_what_the_problem_scores(recommendation_bundle: Path) -> None:
    bundle = Bundle.open(recommendation_bundle)
    result = task_metrics(bundle)
    problem = GatingProblem(bundle, "test", reward_metric="ndcg@10", device="cpu")
    losses = problem.losses(np.arange(len(problem)), problem.reference_gates())
    assert result["metrics"]["ndcg@10"]["personal"]["mean"] == pytest.approx(-losses.mean(), abs=1e-6)
    examples = take(bundle.examples, problem.rows)
    with problem.model.backbone.adapted(None) as model:
        bare = problem.model.domain.metric(model, "recall@10", examples)
    assert result["metrics"]["recall@10"]["backbone"]["mean"] == pytest.approx(float(bare.mean()), abs=1e-6)
    assert result["inputs"] == len(problem) and "torch" in result["versions"]


def test_baselines_are_fitted_on_train_users(recommendation_bundle: Path) -> None:
    users = recommendation_bundle.parent / "users.csv"
    result = task_metrics(Bundle.open(recommendation_bundle), interactions=users)
    rows = result["metrics"]["ndcg@10"]
    assert set(rows) == {"backbone", "shared", "personal", "popularity", "item-kNN"}
    assert all(0 <= row["low"] <= row["mean"] <= row["high"] <= 1 for row in rows.values())
    # what people read next to each other is worth more than a backbone of four steps
    assert rows["item-kNN"]["mean"] > rows["backbone"]["mean"]


def test_image_metric(image_bundle: Path) -> None:
    result = task_metrics(Bundle.open(image_bundle))
    assert np.isfinite([row["mean"] for row in result["metrics"]["psnr"].values()]).all()


def test_text_metrics_are_those_of_greedy_continuations(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    problem = GatingProblem(bundle, "validation", reward_metric="rougeL", device="cpu")
    rows = np.arange(4)
    losses = problem.losses(rows, problem.reference_gates()[rows])
    assert ((losses <= 0) & (losses >= -1)).all()
    text = problem.outcome(0, problem.reference_gates()[0])["model writes"]
    assert isinstance(text, str) and text


@pytest.mark.parametrize("metric", ["ndcg@5", "rougeL", ""])
def test_unknown_reward_metric(recommendation_bundle: Path, metric: str) -> None:
    with pytest.raises(ValueError, match=r"reward_metric=.*one of ndcg@10, recall@10, precision@10"):
        GatingProblem(Bundle.open(recommendation_bundle), reward_metric=metric)


def test_no_gradient_reaches_a_metric(recommendation_bundle: Path) -> None:
    problem = GatingProblem(Bundle.open(recommendation_bundle), reward_metric="ndcg@10")
    assert problem.table is None and problem.l0_penalty == 0.0 and problem.support().reward_metric == "ndcg@10"
    with pytest.raises(ValueError, match=r"reward_metric='ndcg@10': no gradient reaches it"):
        problem.relaxed_losses(torch.arange(2), torch.ones(2, problem.gates))


def test_interactions_of_another_domain(image_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"interactions=.*the bundle is of domain 'image'"):
        task_metrics(Bundle.open(image_bundle), interactions=tmp_path / "x.csv")
