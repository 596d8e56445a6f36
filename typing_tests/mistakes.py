"""What a type checker must refuse. Each line is wrong; an ignore that silences nothing is an error."""

from dstack.api import (
    CPU,
    GPU,
    Client,
    DevEnvironment,
    LocalRepo,
    Memory,
    Profile,
    Range,
    RegistryAuth,
    RemoteRepo,
    Resources,
    RetryPolicy,
    Run,
    Service,
    Task,
    VirtualRepo,
)
from dstack.api import Tasks  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]  # no such name


print(Tasks)  # pyright: ignore[reportUnknownArgumentType]  # what no module has is of no type


def configurations() -> None:
    """Unknown fields, fields of the wrong type, and required ones that are left out."""
    Task(command=["true"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # it is 'commands'
    Task(commands="true")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a list
    Task(commands=[1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # of text
    Task(commands=["true"], ports="8080")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a list
    Task(commands=["true"], ports=[8080.5])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # whole
    Task(commands=["true"], python=["3.12"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # one
    Task(commands=["true"], spot_policy=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # text
    Task(commands=["true"], max_price="1.5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a number
    Task(commands=["true"], backends="aws")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a list
    Task(["true"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # by name only
    Service(commands=["true"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # 'port' is required
    Service(port=None, commands=["true"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # required
    Service(port=80, commands=["true"], replicas=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # whole
    DevEnvironment(ide="emacs")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # not one of them
    DevEnvironment(init="true")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a list
    RegistryAuth(username="robot")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # 'password' is required
    Profile(max_price="cheap")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a number
    RetryPolicy(retry="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a truth value


def resources() -> None:
    """Sizes are text, values cannot be changed."""
    Resources(memory=24)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ambiguous
    Resources(gpus=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # it is 'gpu'
    GPU(memory=24)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ambiguous
    GPU(vendor="intell")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # no such vendor
    CPU(arch="riscv")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # no such architecture
    Memory(24)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ambiguous
    Range[int](min="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a number


def clients(client: Client, run: Run) -> None:
    """Wrong arguments, properties that are only read, and `None` that is not looked for."""
    client.runs.submit(["true"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a configuration
    client.runs.submit(Task(image="x"), max_price="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a number
    client.runs.submit(Task(image="x"), name="train")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # it is 'run_name'
    client.runs.submit(Task(image="x"), repo=".")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a repo
    client.runs.submit(Task(image="x"), resources={"cpu": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a Resources
    client.runs.get("train").stop()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]  # may be None
    client.runs = None  # type: ignore[misc, assignment]  # pyright: ignore[reportAttributeAccessIssue]  # only read
    run.status = "done"  # type: ignore[misc, assignment]  # pyright: ignore[reportAttributeAccessIssue]  # only read
    run.wait()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # no such method
    run.logs("yesterday")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a datetime
    for log in run.logs():
        print(log + "text")  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue, reportUnknownArgumentType]  # bytes
    print(run.ports[80])  # type: ignore[index]  # pyright: ignore[reportOptionalSubscript, reportUnknownArgumentType]  # only while attached
    print(run.hostname.upper())  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]  # only once it has one


def repos(client: Client) -> None:
    """Repos are made by name, and hold bytes."""
    VirtualRepo()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # 'repo_id' is required
    VirtualRepo("files").add_file("a.txt", "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # bytes
    LocalRepo(".")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # by name only
    RemoteRepo("https://git.example.com/a/b")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # by name only
    client.repos.init(".")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a repo
    client.repos.load()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # which folder?
