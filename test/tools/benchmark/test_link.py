"""The emulated link: the rule for its rate, and the namespaces where the machine can have them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_layer import ELEMENT_BYTES, Layer
from sglang_shift.models.families import Role
from sglang_shift.tools.benchmark import link as link_module
from sglang_shift.tools.benchmark import link_rate, linked_server
from sglang_shift.tools.benchmark.link import Link, burst, namespaces
from sglang_shift.tools.benchmark.link_rate import gemm_flops, most_gain, rate_for, read_layer
from sglang_shift.tools.published import TARGETS

# As benchmark/make_model.py makes it for the benchmark.
BENCH = Layer(hidden=1024, intermediate=3584, heads=32, kv_heads=4, head_dim=32)
CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}


def in_config(folder, **changes):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestRule:
    def test_what_a_rank_sends_in_tp(self):
        assert [BENCH.all_reduce_bytes(p, 2) for p in (2, 4, 8)] == [4096, 6144, 7168]
        assert TARGETS["llama-70b"].layer.all_reduce_bytes(8, 2) == 57344

    def test_what_a_rank_sends_in_sp(self):
        # 1/P of the tokens, (P - 1)/P of each: 1024 + 2 x 128 one way, 1024 the other; at P = 8 with 8 KV heads.
        assert [BENCH.exchange_bytes(p, 2) for p in (2, 4)] == [2304 * 2 / 4, 2304 * 2 * 3 / 16]
        assert BENCH.exchange_bytes(8, 2) == 2560 * 2 * 7 / 64

    def test_parameters_and_shards(self):
        assert BENCH.parameters == 1024 * (1024 + 2 * 128) + 1024 * 1024 + 3 * 1024 * 3584
        assert list(BENCH.shards(2).values()) == [(512 + 2 * 64, 1024), (1024, 512), (3584, 1024), (1024, 1792)]
        assert 4 * sum(n * k for n, k in BENCH.shards(4).values()) == BENCH.parameters
        assert BENCH.shards(8)[Role.QKV] == (128 + 2 * 32, 1024)  # a whole KV head
        assert sum(n * k for n, k in BENCH.shards(1).values()) == BENCH.parameters

    @pytest.mark.parametrize("ranks", [0, 3, 64])
    def test_ranks_that_do_not_divide_are_refused(self, ranks):
        with pytest.raises(ShiftError, match=f"{ranks} ranks for 32 heads"):
            BENCH.shards(ranks)
        with pytest.raises(ShiftError, match="6 ranks for 12 heads, 4 KV heads"):
            Layer(hidden=12, intermediate=12, heads=12, kv_heads=4, head_dim=1).shards(6)

    def test_rho_of_the_targets(self):
        llama = TARGETS["llama-70b"]
        assert llama.layer.parameters == 8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672
        gemm = 2 * 855_638_016 / 8 / 1141.38e12
        assert llama.rho.value == pytest.approx(57344 / 368.86e9 / gemm)
        for target in TARGETS.values():
            assert 0.5 < target.rho.low < target.rho.value < target.rho.high < 2

    def test_at_the_rate_communication_takes_rho_times_the_gemms(self):
        rate = rate_for(BENCH, 2, 2, flops=200e9, rho=0.8)
        gemm = 2 * (BENCH.parameters / 2) / 200e9
        assert 4096 * 8 / rate == pytest.approx(0.8 * gemm)
        assert rate_for(BENCH, 2, 2, 400e9, 0.8) == pytest.approx(2 * rate)
        assert rate_for(BENCH, 2, 4, 200e9, 1.6) == pytest.approx(rate)

    def test_sp_gains_the_communication_that_it_saves(self):
        assert most_gain(BENCH, 2, 0.0) == 1
        assert most_gain(BENCH, 2, 1.0) == pytest.approx(2 / (1 + 1152 / 4096))
        assert most_gain(BENCH, 4, 1e9) == pytest.approx(6144 / 864)

    def test_the_model_is_read(self, tmp_path):
        assert read_layer(in_config(tmp_path)) == (BENCH, "bfloat16")
        layer, dtype = read_layer(in_config(tmp_path, head_dim=64, num_key_value_heads=None, dtype="float32"))
        assert (layer.head_dim, layer.kv_heads, dtype) == (64, 32, "float32")

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"hidden_size": None}, "has no 'hidden_size'"),
            ({"torch_dtype": None}, "has no 'torch_dtype'"),
            ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
            ({"num_local_experts": 8}, "experts"),
        ],
    )
    def test_other_models_are_refused(self, tmp_path, changes, problem):
        with pytest.raises(ShiftError, match=f"{problem}.*--model-path"):
            read_layer(in_config(tmp_path, **changes))

    def test_what_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(ShiftError, match="No such file"):
            read_layer(tmp_path)
        for text in ("{", "[]"):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ShiftError, match=r"config\.json: .*; give the folder"):
                read_layer(tmp_path)

    def test_the_choice(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(link_rate, "gemm_flops", lambda *args: asked.append(args) or 200e9)
        choice = link_rate.choose_rate(in_config(tmp_path), 2, "qwen-32b")
        assert asked == [(list(BENCH.shards(2).values()), "bfloat16", 2)]
        assert choice.rho == TARGETS["qwen-32b"].rho.value
        assert choice.rate == rate_for(BENCH, 2, 2, 200e9, choice.rho)
        assert f"rate        {choice.rate / 1e6:.0f} Mbit/s" in choice.text
        assert TARGETS["qwen-32b"].bus_bandwidth.source in choice.text
        with pytest.raises(ShiftError, match="no target gpt; choose one of llama-70b, qwen-32b"):
            link_rate.choose_rate(tmp_path, 2, "gpt")
        with pytest.raises(ShiftError, match="--ranks 1: a rank alone has nothing to send; give 2 or more"):
            link_rate.choose_rate(tmp_path, 1, "qwen-32b")

    @pytest.mark.parametrize(("asked", "used"), [("float32", "float32"), ("auto", "bfloat16"), (None, "bfloat16")])
    def test_the_servers_dtype_counts(self, tmp_path, monkeypatch, asked, used):
        """The servers compute and send in the dtype of their flag, whatever the checkpoint has."""
        monkeypatch.setattr(link_rate, "gemm_flops", lambda shards, dtype, ranks: 200e9)
        choice = link_rate.choose_rate(in_config(tmp_path), 2, "qwen-32b", asked)
        assert choice.rate == rate_for(BENCH, 2, ELEMENT_BYTES[used], 200e9, choice.rho)
        assert f"GFLOP/s in {used}," in choice.text

    def test_every_rank_is_measured(self):
        assert 1e6 < gemm_flops([(8, 16), (16, 8)], "bfloat16", 2) < 1e15


class TestArguments:
    @pytest.fixture(autouse=True)
    def _root(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def test_what_the_machine_lacks_is_said(self, monkeypatch):
        link_module.check()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(ShiftError, match="needs root; run as root, or leave out --link"):
            link_module.check()
        monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else tool)
        with pytest.raises(ShiftError, match="needs `tc`; install iproute2, or leave out --link"):
            Link(2, None)

    @pytest.mark.parametrize(("ranks", "rate"), [(1, None), (255, None), (2, 0.0), (2, 1e13), (2, float("nan"))])
    def test_odd_links_are_refused(self, ranks, rate):
        with pytest.raises(ShiftError, match="an emulated link of"):
            Link(ranks, rate)

    def test_a_packet_passes_at_once_and_what_comes_while_a_timer_is_late(self):
        assert burst(8e6) == 9014 + 100
        assert burst(8e9) == 9014 + 100_000


CONNECT = "import socket,sys; s=socket.socket(); s.settimeout(2); print(s.connect_ex((sys.argv[1], int(sys.argv[2]))))"
LISTEN = "import socket,time; s=socket.socket(); s.bind(('', 7)); s.listen(); print(flush=True); time.sleep(60)"
OWNER = """
import signal, subprocess, sys, time
from sglang_shift.tools.benchmark.link import Link
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
with Link(2, None) as link:
    print(link.namespace(0), subprocess.Popen(link.command(0, ["sleep", "60"])).pid, flush=True)
    time.sleep(60)
"""


def output(argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def connect(command, address, port=7):
    """What connecting from where ``command`` leads comes to: 0 or an errno."""
    return int(output(command([sys.executable, "-c", CONNECT, address, str(port)])))


def gone(condition):
    """Whether ``condition`` becomes false; the kernel takes its time."""
    deadline = time.monotonic() + 10
    while condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not condition()


def running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def interfaces():
    return {line.split()[0] for line in output(["ip", "-br", "link"]).splitlines() if line.startswith("shift")}


@pytest.fixture(scope="module")
def link():
    try:
        link = Link(2, 80e6)
    except ShiftError as error:  # also in a container that may not have namespaces, or with a kernel without tbf
        pytest.skip(str(error))
    with link:
        yield link


@pytest.mark.usefixtures("link")
class TestNamespaces:
    def test_ranks_reach_each_other_and_nothing_else(self, link):
        assert connect(lambda argv: link.command(1, argv), link.address(0)) == errno.ECONNREFUSED
        assert connect(lambda argv: link.command(0, argv), "127.0.0.1") == errno.ECONNREFUSED
        for address in (link.server_address, "192.0.2.1"):
            assert connect(lambda argv: link.command(1, argv), address) == errno.ENETUNREACH

    def test_the_host_reaches_rank_0_alone(self, link):
        assert connect(list, link.server_address) == errno.ECONNREFUSED
        assert "dev shift" in output(["ip", "route", "get", link.server_address])
        assert "dev shift" not in output(["ip", "route", "get", link.address(1)])

    def test_both_ends_have_the_rate(self, link):
        for place, devices in ((0, ["wire"]), (1, ["wire"]), ("switch", ["port0", "port1"])):
            found = json.loads(output(["tc", "-j", "-s", "-n", link.namespace(place), "qdisc", "show"]))
            shaped = {q["dev"]: q["options"] for q in found if q["kind"] == "tbf"}
            assert sorted(shaped) == devices
            assert {q["rate"] * 8 for q in shaped.values()} == {80e6}
            assert [q["burst"] for q in shaped.values()] == pytest.approx([burst(80e6)] * len(devices), abs=10)

    def test_a_second_link_beside_it(self, link):
        listener = subprocess.Popen(link.command(0, [sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE)
        try:
            listener.stdout.readline()
            with Link(3, None) as other:
                assert other.server_address != link.server_address
                assert connect(lambda argv: link.command(1, argv), link.address(0)) == 0
                assert connect(list, link.server_address) == 0
                assert connect(lambda argv: other.command(2, argv), link.address(0)) == errno.ECONNREFUSED
                assert connect(list, other.server_address) == errno.ECONNREFUSED
                assert "tbf" not in output(["tc", "-n", other.namespace("switch"), "qdisc"])
            assert listener.poll() is None
        finally:
            listener.kill()
            listener.wait()
            listener.stdout.close()

    def test_shared_memory_is_each_ranks_own(self, link):
        name = f"sglang_shift_{os.getpid()}"
        assert output(link.command(0, ["sh", "-c", "touch /dev/shm/$0; ls /dev/shm", name])) == name
        assert output(link.command(1, ["ls", "/dev/shm"])) == ""
        assert not Path("/dev/shm", name).exists()

    def test_the_pid_is_the_ranks_and_a_rank_finds_its_address(self, link):
        code = "import os; print(os.getpid(), os.environ['SGLANG_HOST_IP'], os.environ['OMP_NUM_THREADS'])"
        environment = os.environ | link.environment(1)
        process = subprocess.Popen(
            link.command(1, [sys.executable, "-c", code]), stdout=subprocess.PIPE, text=True, env=environment
        )
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        assert process.communicate()[0].split() == [str(process.pid), link.address(1), str(threads)]

    def test_a_rank_of_one_node_enters_its_namespace(self, link):
        code = (
            "import sys; from sglang_shift.tools.benchmark import linked_server; linked_server.enter(sys.argv[1]);"
            "import socket; print([i for _, i in socket.if_nameindex()]);"
            "s = socket.socket(); s.bind((sys.argv[2], 0))"
        )
        names = output(link.command(0, [sys.executable, "-c", code, link.namespace(1), link.address(1)]))
        assert "wire" in names and "management" not in names, "only rank 0 has the other interface"
        with pytest.raises(ShiftError, match="cannot be opened: No such file"):
            linked_server.enter("sglang-shift-none")

    def test_ranks_share_the_cores(self, link, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7, 9})
        bound = [link.environment(rank)["SGLANG_CPU_OMP_THREADS_BIND"] for rank in range(2)]
        assert bound == ["1,3", "5,7"]
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4})
        assert [link.environment(rank)["SGLANG_CPU_OMP_THREADS_BIND"] for rank in range(2)] == ["4", "4"]

    def test_an_error_inside_ends_all(self):
        before = interfaces()
        with pytest.raises(KeyError), Link(2, None) as link:
            assert len(interfaces() - before) == 1
            process = subprocess.Popen(link.command(1, ["sleep", "60"]))
            raise KeyError
        assert process.wait() == -signal.SIGKILL
        assert not [name for name in namespaces() if name.startswith(link.namespace(""))]
        assert gone(lambda: interfaces() - before)
        link.close()

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
    def test_a_killed_owner_leaves_nothing_to_the_next_link(self, how):
        owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
        name, pid = owner.stdout.readline().split()
        assert name in namespaces()
        owner.send_signal(how)
        assert owner.wait() == (3 if how == signal.SIGTERM else -how)
        owner.stdout.close()
        assert (name in namespaces(), running(pid)) == ((False, False) if how == signal.SIGTERM else (True, True))
        Link(2, None).close()
        assert name not in namespaces()
        assert gone(lambda: running(pid))
