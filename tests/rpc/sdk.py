"""What a program does with the published SDK. Argument: the program under test."""

import io
import subprocess
import sys

from matchlock import Client, Config, RPCError, Sandbox

binary = sys.argv[1]


def sandbox():
    return Sandbox("busybox").with_no_network().with_memory(128).with_disk_size(64)


def status_of(vm):
    listed = subprocess.run([binary, "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[1] for line in listed.splitlines() if line.startswith(vm)]


def commands(client):
    result = client.exec("echo out; echo err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, "out\n", "err\n"), result
    assert client.exec("pwd", working_dir="/tmp").stdout == "/tmp\n"
    assert client.exec("echo $GREETING").stdout == "hello\n"

    out, err = io.StringIO(), io.StringIO()
    result = client.exec_stream("for i in 1 2 3; do echo $i; done; echo e >&2", stdout=out, stderr=err)
    assert (result.exit_code, out.getvalue(), err.getvalue()) == (0, "1\n2\n3\n", "e\n"), result

    data = "".join(f"line {n}\n" for n in range(20000))
    out, err = io.StringIO(), io.StringIO()
    result = client.exec_pipe("cat; echo end >&2", stdin=io.StringIO(data), stdout=out, stderr=err)
    assert result.exit_code == 0 and err.getvalue() == "end\n", result
    assert out.getvalue() == data, (len(out.getvalue()), len(data))
    out = io.StringIO()
    assert client.exec_pipe("wc -c; id -u", stdout=out, user="1000").exit_code == 0
    assert out.getvalue() == "0\n1000\n", out.getvalue()


def terminals(client):
    out = io.StringIO()
    script = "tty; stty size; read line; echo got:$line; exit 3"
    keys = io.StringIO("word\n")
    result = client.exec_interactive(script, stdin=keys, stdout=out, rows=40, cols=100)
    said = out.getvalue()
    assert result.exit_code == 3, (result, said)
    assert "/dev/pts/" in said and "40 100\r\n" in said and "got:word\r\n" in said, said
    out = io.StringIO()
    script = "while [ \"$(stty size)\" != '50 120' ]; do sleep 1; done; echo resized"
    result = client.exec_interactive(script, stdout=out, resize=[(50, 120)])
    assert result.exit_code == 0 and "resized" in out.getvalue(), (result, out.getvalue())


def files(client):
    content = bytes(range(256)) * 4096
    client.write_file("/data/deep/file.bin", content, mode=0o750)
    assert client.read_file("/data/deep/file.bin") == content
    client.write_file("/data/text", "words\n")
    assert client.exec("cat /data/text; stat -c %a /data/deep/file.bin /data/deep").stdout == "words\n750\n755\n"
    client.exec("ln -s text /data/link; chmod 1777 /data/deep")
    shown = {f.name: (f.size, f.mode, f.is_dir) for f in client.list_files("/data")}
    assert shown["text"] == (6, 0o644, False), shown
    assert shown["link"][1:] == ((1 << 27) | 0o777, False), shown
    assert shown["deep"][1:] == ((1 << 31) | (1 << 20) | 0o777, True), shown
    assert client.list_files("/data/deep")[0].name == "file.bin"
    client.exec("mkdir /data/empty")
    assert client.list_files("/data/empty") == []
    for missing in (client.read_file, client.list_files):
        try:
            missing("/no/such")
            raise AssertionError("it was there")
        except RPCError as error:
            assert error.is_file_error() and "No such file" in error.message, error


def limits(client):
    try:
        client.exec("while :; do echo x >> /tmp/beat; sleep 1; done", timeout=4)
        raise AssertionError("it ended")
    except TimeoutError:
        pass
    # The cancelled command is gone, and the session goes on.
    for _ in range(20):
        before, after = client.exec("wc -c < /tmp/beat; sleep 3; wc -c < /tmp/beat").stdout.split()
        if before == after and int(before) > 0:
            break
    else:
        raise AssertionError((before, after))
    try:
        client._send_request("no_such_method")
        raise AssertionError("it was there")
    except RPCError as error:
        assert error.code == RPCError.METHOD_NOT_FOUND, error
    try:
        client.port_forward("8080:80")
        raise AssertionError("it was there")
    except RPCError as error:
        assert "port_forward is not available" in error.message, error


client = Client(Config(binary_path=binary))
client.start()
try:
    client.launch(Sandbox("127.0.0.1:1/no-such-image"))
    raise AssertionError("it was there")
except RPCError as error:
    assert error.is_vm_error() and "127.0.0.1:1" in error.message, error
try:
    client.create(sandbox().add_secret("K", "v", "h").with_privileged().options())
    raise AssertionError("it was taken")
except Exception as error:
    assert "no network cannot be combined" in str(error) or "not available" in str(error), error

vm = client.launch(sandbox().with_env("GREETING", "hello").with_entrypoint("sh", "-c", "echo began; sleep 9999"))
assert vm == client.vm_id and status_of(vm) == ["running"], (vm, status_of(vm))
commands(client)
terminals(client)
files(client)
assert client.log() == "began\n", client.log()
log = io.StringIO()
try:
    client.log_stream(stdout=log, timeout=1)
except TimeoutError:
    assert log.getvalue() == "began\n"
limits(client)

process = client._process
client.close()
assert process.returncode == 0, f"it was killed: {process.returncode}"
assert status_of(vm) == ["stopped"], status_of(vm)
client.remove()
assert status_of(vm) == []

# An entrypoint that fails makes the launch fail, and leaves nothing.
with Client(Config(binary_path=binary)) as client:
    try:
        client.launch(sandbox().with_entrypoint("no-such-program"))
        raise AssertionError("it came up")
    except RPCError as error:
        assert error.is_vm_error() and "start image entrypoint: exec: " in error.message, error
print("ok")
