"""Records of runs that never were."""

from configs import experiment_config

from accel_train.runs.record import CriterionResult, GateResult, new_record
from accel_train.tasks.walks.task import WalksTask

CONFIG = experiment_config(description="a test", tags=("x", "y"))


def make_record(**changes):
    record = new_record(CONFIG, WalksTask, command=["train"])
    return record.model_copy(update=changes)


def passed_record(**changes):
    record = make_record(**{"status": "completed", "finished_at": "2026-01-02T00:00:00+00:00", **changes})
    record.curves = {"train_loss": [2.0, 1.0], "edge_compliance": [0.99], "rule_compliance": [0.9]}
    record.gate = GateResult(
        passed=True,
        epoch=1,
        criteria=[CriterionResult(metric="edge_compliance", op=">", threshold=0.95, value=0.99, passed=True)],
        evidence={"rule_checks": 500},
    )
    record.metrics.scalars |= {
        "final_train_loss": 1.0,
        "final_edge_compliance": 0.99,
        "final_rule_compliance": 0.9,
        "gate_passed": True,
        "epochs_trained": 1,
    }
    return record
