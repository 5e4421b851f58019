"""The pool under attack: hangs, memory bombs, deaths, threads; full strength afterwards, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from latent_grpo.reward.answers import grade
from latent_grpo.reward.dispatcher import GraderStartError
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.reward.verifier import Grade, UnknownVerifierError

pytestmark = pytest.mark.integration

BAD = "verifiers_under_test:Misbehaving"
MIB = 2**20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(processes=2, time_limit_s=2.0, memory_limit_bytes=512 * MIB) as pool:
        yield pool


def reasons(pool: VerifierPool, *responses: str) -> list[str]:
    return [verdict.reason for verdict in pool.grade_many([(BAD, response, "") for response in responses])]


@contextlib.contextmanager
def time_limit(pool: VerifierPool, seconds: float) -> Iterator[None]:
    """For cases that are to miss it: the others need one that a busy machine keeps."""
    dispatcher = pool._dispatcher  # no user changes the limit of a pool that runs
    before, dispatcher._time_limit_s = dispatcher._time_limit_s, seconds  # as above
    yield
    dispatcher._time_limit_s = before  # as above


def wait_until(condition, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # where nobody reaps orphans
    except psutil.NoSuchProcess:
        return True


def zombies() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has been reaped since it was listed
            found += [process.pid] * (process.status() == psutil.STATUS_ZOMBIE)
    return found


def hang_many(hangs: int) -> None:
    gc.collect()
    descriptors, children = open_descriptors(), len(psutil.Process().children())
    with VerifierPool(processes=2, time_limit_s=5.0) as pool:
        assert reasons(pool, "ok ", "ok2 ") == ["correct", "correct"]
        memory = psutil.Process().memory_info().rss
        with time_limit(pool, 0.2):
            verdicts = pool.grade_many([(BAD, f"hang {i}", "") for i in range(hangs)])
        assert verdicts == [Grade(0.0, "timeout")] * hangs
        assert wait_until(lambda: len(pool.process_ids()) == 2 and not zombies())
        assert not any(map(gone, pool.process_ids()))
        assert reasons(pool, "ok3 ", "ok4 ") == ["correct", "correct"]
        assert pool.counts()["timeout"] == hangs
        assert psutil.Process().memory_info().rss - memory < 30 * MIB
    assert wait_until(lambda: open_descriptors() <= descriptors)
    assert wait_until(lambda: len(psutil.Process().children()) == children)


def test_after_50_hangs_the_pool_is_at_full_strength_without_zombies_or_leaked_descriptors() -> None:
    hang_many(50)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_1000_hangs_the_pool_is_at_full_strength_without_zombies_or_leaked_descriptors() -> None:
    hang_many(1_000)


def test_a_hang_inside_c_code_is_ended_too(pool: VerifierPool) -> None:
    assert reasons(pool, "hang-in-c ", "ok ") == ["timeout", "correct"]


def test_a_hang_costs_the_other_cases_of_its_request_nothing(pool: VerifierPool) -> None:
    responses = [f"ok{i} " for i in range(100)]
    responses[7] = responses[70] = "hang "
    assert reasons(pool, *responses) == ["timeout" if r == "hang " else "correct" for r in responses]


def test_many_slow_cases_do_not_share_one_time_limit(pool: VerifierPool) -> None:
    slow = [f"sleep 0.{i}" for i in range(55, 59)]  # the first request takes four of sixteen: longer than one limit
    assert reasons(pool, *slow, *(f"sleep 0.0{i:02d}" for i in range(12))) == ["wrong"] * 16


def test_a_memory_bomb_ends_alone(pool: VerifierPool) -> None:
    assert reasons(pool, "ok ", "eat ", "ok2 ") == ["correct", "out_of_memory", "correct"]
    assert pool.grade_many([(BAD, "eat ", "")]) == [Grade(0.0, "out_of_memory")]


def test_memory_that_earlier_cases_kept_is_not_held_against_a_case() -> None:
    with VerifierPool(processes=1, time_limit_s=10, memory_limit_bytes=512 * MIB) as pool:
        verdicts = [pool.grade_many([(BAD, f"keep {200 * MIB} {i}", "")])[0].reason for i in range(4)]
    assert verdicts == ["wrong"] * 4


def test_a_process_that_dies_is_replaced_and_its_case_tried_once_more(pool: VerifierPool, tmp_path: Path) -> None:
    verdicts = pool.grade_many([(BAD, f"die-once {tmp_path / 'died'}", str(tmp_path / "died")), (BAD, "ok ", "")])
    assert [verdict.reason for verdict in verdicts] == ["correct", "correct"]
    assert pool.counts()["processes_lost"] == 1


def test_a_case_that_kills_its_process_twice_stays_ungraded(pool: VerifierPool) -> None:
    verdicts = pool.grade_many([(BAD, "ok ", ""), (BAD, "die ", ""), (BAD, "die 2", ""), (BAD, "ok2 ", "")])
    assert verdicts[1] == verdicts[2] == Grade(None, "ungraded")
    assert [verdicts[0].reason, verdicts[3].reason] == ["correct", "correct"]
    assert pool.counts()["processes_lost"] == 4


def test_killing_every_grader_from_outside_loses_no_verdict() -> None:
    with VerifierPool(processes=2, time_limit_s=30) as pool:
        assert reasons(pool, "ok ") == ["correct"]
        killer = threading.Timer(0.3, lambda: [os.kill(pid, signal.SIGKILL) for pid in pool.process_ids()])
        killer.start()
        assert reasons(pool, *(f"sleep 0.2{i}" for i in range(4))) == ["wrong"] * 4
        killer.join()


def test_a_case_whose_grader_is_stopped_is_graded_by_another_one_and_is_no_timeout() -> None:
    with VerifierPool(processes=1, time_limit_s=2) as pool:
        assert reasons(pool, "ok ") == ["correct"]
        (pid,) = pool.process_ids()
        os.kill(pid, signal.SIGSTOP)
        assert reasons(pool, "ok2 ", "hang ") == ["correct", "timeout"]
        assert pool.counts()["processes_lost"] == 1
        assert wait_until(lambda: gone(pid))


def test_killing_idle_graders_goes_unnoticed(pool: VerifierPool) -> None:
    assert reasons(pool, "ok ") == ["correct"]
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGKILL)
    assert reasons(pool, "ok2 ", "ok3 ") == ["correct", "correct"]


def test_a_verifier_that_raises_or_answers_nonsense_gives_ungraded_and_never_zero(pool: VerifierPool) -> None:
    assert reasons(pool, "raise ", "nonsense ", "ok ") == ["ungraded", "ungraded", "correct"]


def test_what_a_verifier_prints_does_not_disturb_the_pool(pool: VerifierPool) -> None:
    assert reasons(pool, "print ", "ok ") == ["correct", "correct"]


def test_the_order_is_kept_and_equal_cases_are_graded_once(pool: VerifierPool) -> None:
    cases = [(BAD, f"x {i % 40}", str(i % 3)) for i in range(400)]
    random.Random(0).shuffle(cases)
    verdicts = pool.grade_many(cases)
    assert [v.reward for v in verdicts] == [float(text == f"x {gold}") for _, text, gold in cases]
    assert [v.parsed for v in verdicts] == [text for _, text, _ in cases]
    (first, second) = pool.grade_many([(BAD, "pid ", "a"), (BAD, "pid ", "a")])
    assert first is second


def test_processes_are_started_once_and_stay(pool: VerifierPool) -> None:
    seen = {pool.grade_many([(BAD, "pid ", str(i))])[0].parsed for i in range(20)}
    assert len(seen) <= 2
    assert pool.counts()["processes_started"] == 2


def test_threads_share_a_pool(pool: VerifierPool) -> None:
    wrong: list[object] = []

    def work(thread: int) -> None:
        for round_ in range(5):
            cases = [(BAD, f"x {thread}.{round_}.{i}", f"{thread}.{round_}.{i}") for i in range(20)]
            cases.append(("number", rf"\boxed{{{thread}}}", str(thread)))
            wrong.extend(v for v in pool.grade_many(cases) if v.reward != 1.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert wrong == []


def test_asynchronous_verifiers_and_options_work() -> None:
    kind = "verifiers_under_test:Asynchronous"
    with VerifierPool(processes=1, options={kind: {"bonus": 0.5}}) as pool:
        assert [v.reward for v in pool.grade_many([(kind, "a", "a"), (kind, "a", "b")])] == [1.5, 0.0]


def test_asynchronous_verifiers_have_the_same_limits() -> None:
    kind = "verifiers_under_test:Asynchronous"
    cases = [(kind, text, "a") for text in ("a", "hang", "eat", "b")]
    with VerifierPool(processes=1, time_limit_s=2.0, memory_limit_bytes=512 * MIB) as pool:
        assert [v.reason for v in pool.grade_many(cases)] == ["correct", "timeout", "out_of_memory", "wrong"]


def test_compositions_run_in_the_pool_with_names_options_and_asynchronous_parts() -> None:
    judge = {"kind": "verifiers_under_test:Asynchronous", "options": {"bonus": 0.5}}
    definitions = {
        "judge": judge,
        "shaped": {
            "kind": "weighted_sum",
            "options": {"parts": [{"kind": "math", "weight": 1.0}, {"kind": "judge", "weight": 2.0}]},
        },
    }
    options = {"math": {"fallback": "last_number"}}
    with VerifierPool(processes=1, time_limit_s=2.0, options=options, definitions=definitions) as pool:
        found = pool.grade_many([("shaped", "5", "5"), ("shaped", r"\boxed{5.0}", "5"), ("shaped", "hang", "5")])
    assert [(v.reward, v.reason) for v in found] == [(4.0, "correct"), (1.0, "correct"), (0.0, "timeout")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("maths", "Allowed: choice, format"),
        ("no_such_module:Verifier", "cannot be imported"),
        ("verifiers_under_test:Nothing", "no attribute 'Nothing'"),
        ("verifiers_under_test:NoGrade", "without a `grade"),
    ],
)
def test_an_unknown_verifier_is_an_error_and_the_pool_goes_on(pool: VerifierPool, kind: str, message: str) -> None:
    with pytest.raises(UnknownVerifierError, match=message):
        pool.grade_many([(kind, "x", "y")])
    assert reasons(pool, "ok ") == ["correct"]


def test_a_wrong_setting_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="processes is 0"):
        VerifierPool(processes=0)
    with pytest.raises(ValueError, match="last_nubmer"):
        VerifierPool(options={"number": {"fallback": "last_nubmer"}})
    with VerifierPool() as pool, pytest.raises(TypeError, match="Case 1"):
        pool.grade_many([("number", "1", "1"), ("number", None, "1")])


def test_processes_that_cannot_start_are_an_error_within_bounds() -> None:
    with VerifierPool(processes=1, start_limit_s=0.3) as pool, pytest.raises(GraderStartError, match="did not load"):
        pool.grade_many([("verifiers_under_test:Slow", "x", "y")])


def test_processes_that_cannot_start_are_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(processes=2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(GraderStartError, match="exit status 1"):
                reasons(pool, "ok ")
            started = pool.counts()["processes_started"]
            time.sleep(0.5)
            assert pool.counts()["processes_started"] == started
        assert reasons(pool, "ok ") == ["correct"]


def test_plain_answers_need_no_process() -> None:
    with VerifierPool() as pool:
        verdicts = pool.grade_many(
            [("number", r"\boxed{18}", "18"), ("choice", r"\boxed{B}", "B"), ("math", r"\boxed{1{,}234}", "1234")]
        )
        assert [verdict.reason for verdict in verdicts] == ["correct"] * 3
        assert pool.process_ids() == []


def test_an_unreadable_gold_leaves_its_samples_ungraded() -> None:
    with VerifierPool() as pool:
        assert pool.grade_many([("number", r"\boxed{18}", "a dozen")]) == [Grade(None, "ungraded")]


def test_only_the_end_of_an_overlong_response_is_graded() -> None:
    with VerifierPool(max_response_chars=1_000) as pool:
        cases = [("number", r"\boxed{18}" + "x" * 2_000, "18"), ("number", "x" * 2_000 + r"\boxed{18}", "18")]
        assert [verdict.reason for verdict in pool.grade_many(cases)] == ["no_answer", "correct"]


def test_the_pool_agrees_with_grading_here_and_bounds_hostile_mathematics() -> None:
    cases = [
        ("math", r"\boxed{(x+1)^2}", "x^2+2x+1"),
        ("math", r"\boxed{(x+1)^3}", "x^2+2x+1"),
        ("math", r"\boxed{\frac{1}{\sqrt2}}", r"\frac{\sqrt{2}}{2}"),
        ("math", r"\boxed{\frac{}{}}", r"\sqrt{2}"),
    ]
    bombs = [
        r"\boxed{9^{9^{9^{9^9}}}}",
        r"\boxed{(10^{10})!}",
        r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k^{1/3}}}",
        r"\boxed{(x+y+z+w)^{4000}}",
        r"\boxed{" + r"\sqrt{" * 38 + "2" + "}" * 38 + "}",
        r"\boxed{__import__('os').system('touch /tmp/never')}",
    ]
    with VerifierPool(processes=1, time_limit_s=60.0) as pool:
        pool.start()
        assert pool.grade_many(cases) == [grade(*case) for case in cases]
        with time_limit(pool, 1.0):
            verdicts = pool.grade_many([("math", bomb, r"x+\sqrt{2}") for bomb in bombs])
        assert [verdict.reward for verdict in verdicts] == [0.0] * len(bombs), verdicts


LATEX = (
    r"\frac { } {1} ( ) [ ] \{ \} \left( \right) \sqrt ^ _ ^{2} _{3} + - * / = < \le , ; : ! | & \\ \pm \cup \in "
    r"\infty \pi e i x y 0 1 2 10 .5 \text{a} \sin \log \int \sum \lim _{x\to0} \binom \over \begin{pmatrix} "
    r"\end{pmatrix} \begin{cases} \end{cases} \overline ^\circ % $ ' \, \cdot \times \mathbb{R} \lfloor \rfloor "
    r"\boxed{ \ldots or # é √ ½ f(x) x_1 1_2 \begin{ 1/0 0^0 million"
)


def test_latex_without_sense_gets_a_verdict_and_is_never_the_verifiers_fault() -> None:
    draw = random.Random(0)
    soups = ["".join(draw.choices(LATEX.split(), k=draw.randint(1, 14))) for _ in range(400)]
    cases = [("math", rf"\boxed{{{soup}}}", gold) for soup, gold in zip(soups, [r"x^2+\sqrt{7}", "(-3,19]"] * 200)]
    with VerifierPool(processes=2, time_limit_s=1.0) as pool:
        found = {verdict.reason for verdict in pool.grade_many(cases)}
    assert found <= {"wrong", "no_answer", "timeout", "out_of_memory"}, found


def test_the_folder_stands_alone(tmp_path: Path) -> None:
    """Copied into another project it grades there: nothing of this one is imported."""
    shutil.copytree(ROOT / "reward", tmp_path / "reward", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import sys; from latent_grpo.reward.answers import grade; from latent_grpo.reward.pool import VerifierPool; "
        "pool = VerifierPool(processes=1); case = ('math', r'\\boxed{(x+1)^2}', 'x^2+2x+1'); "
        "assert pool.grade_many([case]) == [grade(*case)] and grade(*case).reward == 1.0; pool.close(); "
        "assert not {'common', 'deploy', 'learner', 'pydantic'} & set(sys.modules), 'not alone'"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=300, cwd=tmp_path, env=environment)


def test_closing_ends_waiting_calls_and_later_ones() -> None:
    pool = VerifierPool(processes=1, time_limit_s=600)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            pool.grade_many([(BAD, "hang ", "")])
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert wait_until(lambda: len(pool.process_ids()) == 1)
    pool.close()
    pool.close()
    thread.join(60)  # a tenth of the time limit
    assert not thread.is_alive()
    assert "closed" in str(errors[0])
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade_many([(BAD, "ok ", "")])


def test_a_pool_that_is_forgotten_frees_its_processes() -> None:
    pool = VerifierPool(processes=1)
    assert reasons(pool, "ok ") == ["correct"]
    (pid,) = pool.process_ids()
    del pool
    gc.collect()
    assert wait_until(lambda: gone(pid))


PARENT = """
import sys, time, threading
sys.path.insert(0, {here!r})
from latent_grpo.reward.pool import VerifierPool
pool = VerifierPool(processes=2, time_limit_s=1.0)
pool.grade_many([({bad!r}, "ok ", "")])
threading.Thread(target=pool.grade_many, args=([({bad!r}, {action!r}, "")],), daemon=True).start()
time.sleep(0.3)
print(*pool.process_ids(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("action", ["ok2 ", "sleep 0.9"])
def test_graders_end_when_their_parent_is_killed(action: str) -> None:
    program = PARENT.format(here=str(Path(__file__).parent), bad=BAD, action=action)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    graders = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(graders) == 2
    parent.kill()
    parent.wait(60)
    parent.stdout.close()
    assert wait_until(lambda: all(map(gone, graders)))


def test_a_grader_process_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; import latent_grpo.reward.grader_process, latent_grpo.reward.answers; "
        "from latent_grpo.reward.verifier import load_verifier; "
        "load_verifier('math').warm_up(); "
        "assert not {'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=ROOT)


def test_a_pool_works_inside_a_ray_actor(ray_session) -> None:
    ray = pytest.importorskip("ray")

    class Worker:
        def __init__(self) -> None:
            self.pool = VerifierPool(processes=1, time_limit_s=2)

        def grade(self) -> list[str]:
            cases = [(BAD, "hang ", ""), (BAD, "ok ", ""), ("math", r"\boxed{1+x}", "x+1"), ("number", "", "1")]
            return [verdict.reason for verdict in self.pool.grade_many(cases)]

    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    worker = ray.remote(Worker).options(runtime_env={"env_vars": {"PYTHONPATH": path}}).remote()
    assert ray.get(worker.grade.remote(), timeout=300) == ["timeout", "correct", "correct", "no_answer"]
