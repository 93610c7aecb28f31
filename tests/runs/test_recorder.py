"""What a run reports while it trains."""

from conftest import make_config

from src.runs import recorder
from src.runs.recorder import RunRecorder
from src.runs.run_folder import create_run_folder, dated_run_folder


def test_curves_are_drawn_while_training_goes_on_but_not_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "DRAW_S", 100.0)
    now = [1000.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now[0])
    folder = create_run_folder(dated_run_folder(str(tmp_path)))
    recorded = RunRecorder(folder, make_config(), lambda text: None, {})
    recorded.start({"ant": 0})
    drawn = []
    for epoch in range(1, 6):
        now[0] += 60
        recorded.add_epoch(
            {
                "epoch": epoch,
                "step": epoch,
                "loss": 1.0 / epoch,
                "lr": 0.1,
                "images_per_second": 1.0,
            }
        )
        drawn.append(folder.curves.is_file())
        folder.curves.unlink(missing_ok=True)
    assert drawn == [False, True, False, True, False]
    recorded.finish()
    assert folder.curves.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
