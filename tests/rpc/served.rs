//! `matchlock serve`: many clients, each with VMs of its own.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;

use matchlock_test_support::{Installation, Running, Session, wait_until};
use rustix::process::Signal;
use serde_json::json;

use super::{PATIENCE, text};

struct Server {
    installation: Installation,
    running: Running,
    socket: PathBuf,
}

fn server() -> Server {
    let installation = Installation::new().unwrap();
    // Deeper than an address can say.
    let dir = installation.home().with_file_name("d".repeat(120));
    std::fs::create_dir(&dir).unwrap();
    let socket = dir.join("s");
    let running = installation.start(&["serve", "--socket", socket.to_str().unwrap()]).unwrap();
    wait_until(PATIENCE, "its socket", || Ok(socket.try_exists()?)).unwrap();
    Server { installation, running, socket }
}

impl Server {
    fn connect(&self) -> Session {
        let dir = std::fs::File::open(self.socket.parent().unwrap()).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&dir);
        let mut session = None;
        wait_until(PATIENCE, "its socket", || {
            session = Session::connect(&PathBuf::from(format!("/proc/self/fd/{fd}/s"))).ok();
            Ok(session.is_some())
        })
        .unwrap();
        session.unwrap()
    }

    fn statuses(&self) -> Vec<String> {
        self.installation.list().unwrap().into_iter().map(|(_, status)| status).collect()
    }
}

#[test]
fn each_client_has_vms_of_its_own_that_end_with_it() {
    let server = server();
    let mode = std::fs::symlink_metadata(&server.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (mut one, mut other) = (server.connect(), server.connect());
    let first = one.create_vm().unwrap();
    let second = other.create_vm().unwrap();
    let theirs = json!({ "vm_id": second, "command": "true" });
    let (code, message) = one.ask("exec", &theirs).unwrap().unwrap_err();
    assert!(code == -32000 && message.contains("not one of this session"), "{message}");
    assert_eq!(one.call("list", &json!({})).unwrap()["vms"].as_array().unwrap().len(), 1);

    let sleeping = other.send("exec_stream", &json!({ "command": "echo up; sleep 1000" })).unwrap();
    other.message("its output", |m| m["method"] == "exec_stream.stdout").unwrap();
    // A client that is gone, with everything it was doing.
    one.send("exec", &json!({ "command": "sleep 1000" })).unwrap();
    drop(one);
    wait_until(PATIENCE, "the end of its VM", || Ok(server.statuses() == ["running"])).unwrap();
    let remains = server.installation.remains().unwrap();
    assert!(!remains.files.iter().any(|file| file.ends_with(&first)), "{remains:?}");
    let result = other.call("exec", &json!({ "command": "hostname" })).unwrap();
    assert_eq!(text(&result["stdout"]), format!("{second}\n"));

    // A session that closes leaves the server as it is.
    let mut third = server.connect();
    assert_eq!(third.call("close", &json!({})).unwrap(), json!({}));
    assert_eq!(third.wait(PATIENCE).unwrap(), None);
    let taken = ["serve", "--socket", server.socket.to_str().unwrap()];
    let refused = server.installation.output(&taken).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("another process listens"), "{said}");

    let Server { installation, running, socket } = server;
    running.signal(Signal::TERM).unwrap();
    assert_eq!(other.answer(sleeping).unwrap().unwrap_err().0, -32003);
    let output = running.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!socket.try_exists().unwrap(), "the socket goes with it");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn other_users_are_refused() {
    let server = server();
    // The mode keeps them out; so that only the credentials do, it is opened here.
    std::fs::set_permissions(&server.socket, Permissions::from_mode(0o666)).unwrap();
    let opened = server.installation.home().parent().unwrap().to_path_buf();
    std::fs::set_permissions(opened, Permissions::from_mode(0o755)).unwrap();
    let script = "import socket,os,sys\n\
        os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534)\n\
        s=socket.socket(socket.AF_UNIX); s.connect('s')\n\
        s.sendall(b'{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"list\"}\\n')\n\
        print(s.recv(100))";
    let output = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(server.socket.parent().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said == "b''\n" || wrong.contains("ConnectionReset") || wrong.contains("BrokenPipe"),
        "{said} {wrong}"
    );
    let mut own = server.connect();
    assert_eq!(own.call("list", &json!({})).unwrap(), json!({ "vms": [] }));
}
