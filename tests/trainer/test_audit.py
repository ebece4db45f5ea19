from cluster.storage import Storage
from trainer.audit import AuditLog, next_attempt, read_audit


def record(storage: Storage, attempt: str, steps: dict[int, list[int]]) -> None:
    log = AuditLog(storage, attempt=attempt, rank=0, first_step=min(steps), enabled=True)
    for step, users in steps.items():
        log.record(step, 0, users)
    log.flush()


def test_steps_that_a_later_start_took_again_are_void(tmp_path):
    storage = Storage(tmp_path)
    record(storage, "0001-a", {0: [1, 2], 1: [3], 2: [4]})
    assert next_attempt(storage) == 2
    record(storage, "0002-b", {1: [3, 5], 2: [6]})
    assert read_audit(storage) == {0: [1, 2, 3, 5, 6]}


def test_the_torn_file_of_a_killed_process_is_no_part_of_the_audit(tmp_path):
    storage = Storage(tmp_path)
    record(storage, "0001-a", {0: [1, 2]})
    (written,) = (tmp_path / "audit").iterdir()
    for copy in (written.read_text(), written.read_text()[:9]):
        written.with_name(f"{written.name}.{len(copy)}.tmp").write_text(copy)
    assert read_audit(storage) == {0: [1, 2]}
    assert next_attempt(storage) == 2
