//! Images that are unusual, and images in use.

use std::process::Stdio;

use matchlock_test_support::Installation;
use rustix::process::Signal;

use super::{PATIENCE, stderr, stdout};

/// A docker-save archive of one layer with these files: name, mode, content.
fn archive(files: &[(&str, u32, &[u8])], config: &str) -> Vec<u8> {
    let layer = tar_of(files);
    let diff_id = sha256(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{config},"rootfs":{{"type":"layers","diff_ids":["sha256:{diff_id}"]}}}}"#
    );
    let name = format!("{}.json", sha256(config.as_bytes()));
    let manifest = format!(r#"[{{"Config":"{name}","RepoTags":null,"Layers":["layer.tar"]}}]"#);
    tar_of(&[
        (&name, 0o644, config.as_bytes()),
        ("layer.tar", 0o644, &layer),
        ("manifest.json", 0o644, manifest.as_bytes()),
    ])
}

fn tar_of(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}

fn import(installation: &Installation, tag: &str, archive: Vec<u8>) {
    use std::io::Write as _;
    let mut child = installation
        .command(&["image", "import", tag])
        .unwrap()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&archive).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

/// No shell, no /etc, no /proc: one static program and nothing else.
#[test]
fn an_image_of_one_program_boots() {
    let installation = Installation::without_images().unwrap();
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let config = r#"{"Entrypoint":["/prog/echo","hello"],"Cmd":["world"],"Env":["A=b"]}"#;
    import(&installation, "single", archive(&[("prog/echo", 0o755, &busybox)], config));
    let run = |command: &[&str]| {
        let mut args = vec!["run", "--no-network", "--image", "single"];
        args.extend(command);
        installation.output(&args).unwrap()
    };
    let output = run(&[]);
    assert_eq!(stdout(&output), "hello world\n", "{}", stderr(&output));
    let output = run(&["--", "you"]);
    assert_eq!(stdout(&output), "hello you\n", "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn an_image_in_use_is_not_removed() {
    let installation = Installation::without_images().unwrap();
    let archive = std::fs::read(matchlock_test_support::busybox_archive().unwrap()).unwrap();
    import(&installation, "busybox", archive);
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    installation.wait_for_status("running").unwrap();
    let refused = installation.output(&["image", "rm", "busybox"]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("in use by a running VM"), "{}", stderr(&refused));
    run.signal(Signal::TERM).unwrap();
    assert_eq!(run.wait(PATIENCE).unwrap().status.code(), Some(143));
    assert_eq!(installation.output(&["image", "rm", "busybox"]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}
