"""Finding what a training run left."""

import os

from gnpractical.runs.saved_run import find_run


def test_of_two_runs_in_one_folder_the_last_describes_the_model(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    for older, newer in (("options.json", "config.yaml"), ("config.yaml", "options.json")):
        (tmp_path / newer).write_text("")
        (tmp_path / older).write_text("")
        os.utime(tmp_path / older, (1, 1))
        assert find_run(str(tmp_path / "model.pth")).description == tmp_path / newer
