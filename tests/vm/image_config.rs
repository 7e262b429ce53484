//! What an image says about how it is run, honoured as docker does.

use std::io::{Read as _, Write as _};
use std::process::{Output, Stdio};

use matchlock_test_support::{Installation, busybox_archive, wait_until};

use super::{PATIENCE, stderr, stdout};

/// The files of the busybox image, as one tar.
pub(super) fn busybox_files() -> Vec<u8> {
    let archive = std::fs::File::open(busybox_archive().unwrap()).unwrap();
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("layer.tar") {
            let mut layer = Vec::new();
            entry.read_to_end(&mut layer).unwrap();
            return layer;
        }
    }
    panic!("the busybox image has no layer")
}

/// `image import` with these arguments.
pub(super) fn import(installation: &Installation, args: &[&str], archive: &[u8]) -> Output {
    let mut command = installation.command(&[&["image", "import"], args].concat()).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(archive).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    output
}

#[test]
fn a_config_says_how_an_image_is_run() {
    let installation = Installation::without_images().unwrap();
    let changes = [
        "set",
        "-c",
        "USER user",
        "-c",
        "WORKDIR /made/for/it",
        "-c",
        "ENV A=image",
        "-c",
        "ENTRYPOINT [\"/bin/sh\", \"-c\"]",
        "-c",
        "CMD [\"id -u; id -g; pwd; echo $A $HOME\"]",
    ];
    import(&installation, &changes, &busybox_files());
    let run = |flags: &[&str], command: &[&str]| {
        let start: &[&str] = &["run", "--no-network", "--image", "set"];
        let output = installation.output(&[start, flags, &["--"], command].concat()).unwrap();
        assert_eq!(output.status.code(), Some(0), "{flags:?}: {}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(run(&[], &[]), "1000\n1000\n/made/for/it\nimage /home/user\n");
    // A command replaces CMD and stays behind the entrypoint.
    assert_eq!(run(&[], &["echo $A; id -u"]), "image\n1000\n");
    assert_eq!(run(&["-e", "A=mine"], &["echo $A"]), "mine\n");
    // What is given goes before what the image says; a group by its name, ids that no file knows.
    assert_eq!(
        run(&["-u", "root:user", "-w", "/new/one"], &["id -u; id -g; pwd"]),
        "0\n1000\n/new/one\n"
    );
    assert_eq!(run(&["-u", "4242:4343"], &["id -u; id -g"]), "4242\n4343\n");
    // An entrypoint of one's own clears CMD; an empty one runs the command as it is.
    assert_eq!(run(&["--entrypoint", "/bin/echo"], &[]), "\n");
    assert_eq!(run(&["--entrypoint", ""], &["echo", "$A"]), "$A\n");
    let args = ["run", "--no-network", "--image", "set", "--entrypoint", ""];
    let output = installation.output(&args).unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("command required"), "{}", stderr(&output));
    let output =
        installation.output(&["run", "--no-network", "--image", "set", "-u", "nobody-here"]);
    let output = output.unwrap();
    assert_ne!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("nobody-here"), "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_further_command_is_run_as_the_image_says() {
    let installation = Installation::without_images().unwrap();
    let changes = ["set", "-c", "USER user", "-c", "WORKDIR /made", "-c", "ENV A=image"];
    import(&installation, &changes, &busybox_files());
    let args = ["run", "-d", "--no-network", "--image", "set", "--", "sleep", "100000"];
    let vm = stdout(&installation.output(&args).unwrap()).trim_end().to_owned();
    let exec = |flags: &[&str], script: &str| {
        let all = [&["exec"], flags, &[&*vm, "--", "sh", "-c", script]].concat();
        let output = installation.output(&all).unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(exec(&[], "id -u; pwd; echo $A"), "1000\n/made\nimage\n");
    assert_eq!(exec(&["-u", "0", "-w", "/", "-e", "A=b"], "id -u; pwd; echo $A"), "0\n/\nb\n");
    for args in [&["kill", &*vm][..], &["rm", &vm]] {
        let output = installation.output(args).unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
    installation.assert_nothing_left().unwrap();
}

/// The command's group gets what its image asks for, and no SIGTERM; another command of the same VM
/// gets SIGTERM.
#[test]
fn the_signal_that_stops_it_is_the_images() {
    let installation = Installation::without_images().unwrap();
    import(&installation, &["set", "-c", "STOPSIGNAL SIGUSR1"], &busybox_files());
    let script = |name: &str| {
        format!(
            "trap 'echo {name} usr1; sleep 1; exit 7' USR1; trap 'echo {name} term; sleep 1; exit 8' TERM; \
             echo {name} ready; while :; do sleep 0.1; done"
        )
    };
    let flags = ["run", "-d", "--rm=false", "--no-network", "--image", "set", "--", "sh", "-c"];
    let output = installation.output(&[&flags[..], &[&script("own")]].concat()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let vm = stdout(&output).trim_end().to_owned();
    let log = || stdout(&installation.output(&["log", &vm]).unwrap());
    wait_until(PATIENCE, "the command", || Ok(log() == "own ready\n")).unwrap();
    // Its words go to the VM's own command's log as well: it has no other way to tell that is kept.
    let mut other =
        installation.command(&["exec", &vm, "--", "sh", "-c", &script("other")]).unwrap();
    let mut other = other.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(other.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
    assert_eq!(line, "other ready\n");
    let killed = installation.output(&["kill", &vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    other.wait().unwrap();
    assert!(rest.contains("other term\n") && !rest.contains("usr1"), "{rest}");
    // The shell itself names the signal that ended its child.
    let words = log();
    assert!(words.contains("own usr1\n") && !words.contains("own term"), "{words}");
    let inspected = installation.output(&["get", &vm]).unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(shown["exit_code"], 7, "{shown}");
    let removed = installation.output(&["rm", &vm]).unwrap();
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

/// A command that takes too long gets it too.
#[test]
fn a_timeout_stops_with_the_images_signal() {
    let installation = Installation::without_images().unwrap();
    import(&installation, &["set", "-c", "STOPSIGNAL 12"], &busybox_files());
    let script =
        "trap 'echo usr2; exit 0' USR2; trap 'echo term; exit 0' TERM; while :; do sleep 0.1; done";
    let args =
        ["run", "--no-network", "--image", "set", "--timeout", "3s", "--", "sh", "-c", script];
    let output = installation.output(&args).unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", stderr(&output));
    let words = stdout(&output);
    assert!(words.contains("usr2\n") && !words.contains("term"), "{words}");
    installation.assert_nothing_left().unwrap();
}
