//! Images through the command line: import, list, remove, and what is refused.

use std::fs::File;
use std::io::Write as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use matchlock_test_support::{Installation, Running, busybox_archive, wait_until};
use rustix::process::Signal;

/// How long something may take on a loaded machine before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

fn import(installation: &Installation, tag: &str, archive: &[u8]) -> Output {
    let mut child = installation
        .command(&["image", "import", tag])
        .unwrap()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // The program may refuse before it has read everything.
    drop(stdin.write_all(archive));
    drop(stdin);
    child.wait_with_output().unwrap()
}

pub(crate) fn import_busybox(installation: &Installation, tag: &str) -> Output {
    let archive = File::open(busybox_archive().unwrap()).unwrap();
    installation.command(&["image", "import", tag]).unwrap().stdin(archive).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn temporary_files(installation: &Installation) -> usize {
    installation.cache().join("images/tmp").read_dir().map_or(0, Iterator::count)
}

#[test]
fn import_list_remove() {
    let installation = Installation::bare().unwrap();
    let imported = import_busybox(&installation, "busybox");
    assert_eq!(imported.status.code(), Some(0), "{}", text(&imported.stderr));
    let lines = text(&imported.stdout);
    assert!(lines.starts_with("Imported: busybox\nLayers: 1\nSize: "), "{lines}");
    assert_eq!(import_busybox(&installation, "other:1").status.code(), Some(0));

    let listed = text(&installation.output(&["image", "ls"]).unwrap().stdout);
    assert!(listed.starts_with("TAG"), "{listed}");
    assert!(listed.contains("busybox ") && listed.contains("other:1 "), "{listed}");

    let blobs = installation.cache().join("images/blobs");
    let count = || blobs.read_dir().unwrap().count();
    assert_eq!(count(), 1, "both tags share one blob");
    let removed = installation.output(&["image", "rm", "busybox"]).unwrap();
    assert_eq!(text(&removed.stdout), "Removed busybox\n");
    assert_eq!(count(), 1, "the other tag still uses it");
    assert_eq!(installation.output(&["image", "rm", "other:1"]).unwrap().status.code(), Some(0));
    assert_eq!(count(), 0);
    let again = installation.output(&["image", "rm", "busybox"]).unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(text(&again.stderr), "matchlock: image not found: \"busybox\"\n");
    assert_eq!(temporary_files(&installation), 0);
}

#[test]
fn bad_archives_are_refused_and_leave_nothing() {
    let installation = Installation::bare().unwrap();
    let good = std::fs::read(busybox_archive().unwrap()).unwrap();
    let cases: [(&str, Vec<u8>); 5] = [
        ("nothing", Vec::new()),
        ("no archive", b"this is not an archive, whatever its name says".repeat(50)),
        ("truncated early", good[..good.len() / 3].to_vec()),
        ("truncated late", good[..good.len() * 9 / 10].to_vec()),
        ("without its manifest", archive_of("../../escape", b"x")),
    ];
    for (what, archive) in cases {
        let output = import(&installation, "bad", &archive);
        assert_eq!(output.status.code(), Some(1), "{what}: {}", text(&output.stdout));
        let line = text(&output.stderr);
        assert_eq!(line.lines().count(), 2, "{what}: {line}");
        assert_eq!(temporary_files(&installation), 0, "{what} left something");
    }
    let listed = text(&installation.output(&["image", "ls"]).unwrap().stdout);
    assert_eq!(listed.lines().count(), 1, "{listed}");
}

#[test]
fn a_signal_ends_an_import_that_waits_and_nothing_is_left() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let installation = Installation::bare().unwrap();
        let mut command = installation.command(&["image", "import", "x"]).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut importing = Running::start(&mut command).unwrap();
        let mut stdin = importing.stdin().unwrap();
        stdin.write_all(&archive_of("a", b"x")[..700]).unwrap();
        let has_begun = || Ok(temporary_files(&installation) > 0);
        wait_until(PATIENCE, "the import", has_begun).unwrap();
        importing.signal(signal).unwrap();
        // Without a further byte, and without its end.
        let output = importing.wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert_eq!(temporary_files(&installation), 0);
        drop(stdin);
    }
}

/// A tar with one member, whose name is written as it is.
fn archive_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, content).unwrap();
    builder.into_inner().unwrap()
}
