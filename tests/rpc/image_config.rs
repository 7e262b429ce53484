//! What an image, `create` and `exec` say about how commands are run, the last before the first.

use std::fs::File;

use matchlock_test_support::{Installation, Session, busybox_archive, small_vm, wait_until};
use serde_json::{Value, json};

use super::{PATIENCE, close, rpc, text};

fn printed(session: &mut Session, params: &Value) -> String {
    let result = session.call("exec", params).unwrap();
    assert_eq!(result["exit_code"], 0, "{result}");
    text(&result["stdout"])
}

#[test]
fn a_command_is_run_as_image_session_and_request_say() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let mut vm = small_vm();
    vm["env"] = json!({ "B": "session" });
    vm["image_config"] = json!({
        "user": "user", "working_dir": "/made/here", "env": { "A": "image", "B": "image" },
    });
    session.call("create", &vm).unwrap();
    let script = "id -u; id -g; pwd; echo $A $B $HOME";
    let command = json!({ "command": script });
    assert_eq!(
        printed(&mut session, &command),
        "1000\n1000\n/made/here\nimage session /home/user\n"
    );
    let command = json!({
        "command": script, "user": "4242:4343", "working_dir": "/tmp", "env": { "B": "request" },
    });
    let lines = printed(&mut session, &command);
    assert!(lines.starts_with("4242\n4343\n/tmp\nimage request"), "{lines}");
    close(session, &installation);
}

/// The image's own entrypoint, started by the session, gets the image's signal when its VM is taken
/// down gracefully.
#[test]
fn the_entrypoint_is_the_images_and_gets_its_signal() {
    let installation = Installation::without_images().unwrap();
    // A root filesystem whose entrypoint needs no file but busybox.
    let place = tempfile::tempdir().unwrap();
    let unpack = "mkdir files rootfs; tar -xf \"$0\" -C files; tar -xf files/*/layer.tar -C rootfs; \
                  tar -cf rootfs.tar -C rootfs .";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", unpack]).arg(busybox_archive().unwrap()).current_dir(place.path());
    assert!(shell.status().unwrap().success());
    let entry = "ENTRYPOINT [\"/bin/sh\", \"-c\", \"trap 'echo quit; sleep 1; exit' QUIT; \
                 trap 'echo term; exit' TERM; echo up; while :; do sleep 0.1; done\"]";
    let args = ["image", "import", "busybox", "-c", entry, "-c", "STOPSIGNAL SIGQUIT"];
    let mut import = installation.command(&args).unwrap();
    let archive = File::open(place.path().join("rootfs.tar")).unwrap();
    assert!(import.stdin(archive).output().unwrap().status.success());

    let mut session = rpc(&installation, &[]);
    let mut vm = small_vm();
    vm["launch_entrypoint"] = json!(true);
    vm["remove"] = json!(false);
    let id = session.call("create", &vm).unwrap()["id"].as_str().unwrap().to_owned();
    let log = || {
        let output = installation.output(&["log", &id]).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    wait_until(PATIENCE, "the entrypoint", || Ok(log() == "up\n")).unwrap();
    let killed = installation.output(&["kill", &id]).unwrap();
    assert!(killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr));
    let words = log();
    assert!(words.contains("quit\n") && !words.contains("term\n"), "{words}");
    let removed = installation.output(&["rm", &id]).unwrap();
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    close(session, &installation);
}
