"""The agent's configuration file: defaults, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import load
from agent.errors import ConfigError


def _write(folder: Path, text: str) -> Path:
    for name in ("ca", "cert", "key"):
        (folder / f"{name}.pem").write_text("")
    path = folder / "agent.toml"
    path.write_text(text.replace("DIR", str(folder)))
    return path


TLS = '[tls]\nca = "DIR/ca.pem"\ncertificate = "DIR/cert.pem"\nkey = "DIR/key.pem"\n'


def test_only_the_certificates_must_be_given(tmp_path: Path) -> None:
    config = load(_write(tmp_path, TLS))
    assert (config.control_port, config.bulk_port) == (9860, 9861)
    assert config.libvirt.uri == "qemu:///system"
    assert config.name


def test_every_setting_can_be_given(tmp_path: Path) -> None:
    text = (
        'name = "prod1"\nlisten = "10.0.0.1"\ncontrol_port = 1\nbulk_port = 2\nstate_dir = "/s"\nruntime_dir = "/r"\n'
        + TLS
        + '[libvirt]\nuri = "qemu:///embed?root=/x"\nscratch_dir = "/y"\n'
        + "[scratch]\nused_percent = 50\nreserve_mib = 7\n"
    )
    config = load(_write(tmp_path, text))
    assert (config.name, config.listen, config.control_port, config.bulk_port) == ("prod1", "10.0.0.1", 1, 2)
    assert (config.scratch.used_percent, config.scratch.reserve_mib) == (50, 7)
    assert (config.state_dir, config.runtime_dir, config.libvirt.scratch_dir) == (Path("/s"), Path("/r"), Path("/y"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "is not TOML"),
        ("", '"tls" is missing'),
        ("unheard = 1\n" + TLS, '"unheard" is not a setting'),
        (TLS + "colour = 1\n", '"tls.colour" is not a setting'),
        ('[tls]\nca = "DIR/ca.pem"\ncertificate = "DIR/cert.pem"\n', '"tls.key" is missing'),
        ('control_port = "9860"\n' + TLS, '"control_port" must be of type int'),
        ("control_port = true\n" + TLS, '"control_port" must be of type int'),
        ("control_port = 70000\n" + TLS, "from 1 to 65535"),
        ("control_port = 9861\n" + TLS, "must differ"),
        (TLS.replace("DIR/key.pem", "DIR/nowhere.pem"), "missing or not readable"),
        (TLS + "[scratch]\nused_percent = 100\n", "from 1 to 99"),
        (TLS + "[scratch]\nreserve_mib = 0\n", "at least 1"),
        (TLS + "[libvirt]\nuri = 3\n", '"libvirt.uri" must be of type str'),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(_write(tmp_path, text))
    assert "\n" not in caught.value.sentence


def test_a_missing_file_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "agent.daemon", "--config", str(tmp_path / "none.toml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("failback-agent: there is no configuration file")
    assert len(done.stderr.splitlines()) == 1
