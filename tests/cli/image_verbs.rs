//! The verbs of `image` beside a plain import: several images, tags, JSON, garbage.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use matchlock_test_support::{Installation, Running};
use serde_json::{Value, json};

use crate::cli_images::{import_busybox, text};

/// Runs a verb of `image` that succeeds.
fn ok(installation: &Installation, args: &[&str]) -> String {
    let output = installation.output(&[&["image"], args].concat()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn shown(installation: &Installation, args: &[&str]) -> Value {
    serde_json::from_str(&ok(installation, args)).unwrap()
}

/// Runs a verb of `image` that fails with 1; what it says.
fn fails(installation: &Installation, args: &[&str]) -> Output {
    let output = installation.output(&[&["image"], args].concat()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stdout));
    output
}

fn blobs(installation: &Installation) -> Vec<PathBuf> {
    let directory = installation.cache().join("images/blobs");
    let entries = directory.read_dir().map_or_else(|_| Vec::new(), Iterator::collect);
    entries.into_iter().map(|entry| entry.unwrap().path()).collect()
}

/// `image import` of a tar with one file that holds this.
fn start_import(installation: &Installation, args: &[&str], content: &str) -> Running {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, "file", content.as_bytes()).unwrap();
    let mut command = installation.command(&[&["image", "import"], args].concat()).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut command).unwrap();
    running.stdin().unwrap().write_all(&builder.into_inner().unwrap()).unwrap();
    running
}

fn import(installation: &Installation, args: &[&str], content: &str) -> String {
    let output = start_import(installation, args, content).wait(crate::PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn inspect_shows_all_there_is_to_know() {
    let installation = Installation::bare().unwrap();
    let changes = ["-c", "CMD [\"a\"]", "-c", "LABEL x=y", "-c", "STOPSIGNAL SIGQUIT"];
    let printed = import(&installation, &[&["mine:1", "--json"], &changes[..]].concat(), "hello");
    let imported: Value = serde_json::from_str(&printed).unwrap();
    ok(&installation, &["tag", "mine:1", "mine:2"]);
    let all = shown(&installation, &["inspect", "mine:1", "mine:2"]);
    let one = &all[0];
    assert_eq!(
        (&one["tag"], &one["scope"], &one["source"]),
        (&json!("mine:1"), &json!("local"), &json!("import"))
    );
    assert_eq!((&all[1]["source"], &all[1]["digest"]), (&json!("tag"), &one["digest"]));
    assert_eq!(one["layers"], imported[0]["layers"]);
    assert_eq!((&one["digest"], &one["size"]), (&imported[0]["digest"], &imported[0]["size"]));
    let mut tags: Vec<&str> =
        one["tags"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    tags.sort_unstable();
    assert_eq!(tags, ["mine:1", "mine:2"]);
    assert_eq!(one["used_by"], json!([]));
    assert_eq!(
        (&one["config"]["cmd"], &one["config"]["labels"]["x"]),
        (&json!(["a"]), &json!("y"))
    );
    assert_eq!(one["config"]["stop_signal"], "SIGQUIT");
    let path = one["rootfs_path"].as_str().unwrap();
    assert!(
        Path::new(path).starts_with(installation.cache()) && Path::new(path).try_exists().unwrap()
    );
    // What is not there is named; the rest is printed all the same.
    let failed = fails(&installation, &["inspect", "none", "mine:1"]);
    assert_eq!(text(&failed.stderr), "matchlock: image not found: \"none\"\n");
    let rest: Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!(rest.as_array().unwrap().len(), 1);
}

#[test]
fn tags_come_and_go_and_share_a_blob() {
    let installation = Installation::bare().unwrap();
    assert_eq!(import_busybox(&installation, "busybox").status.code(), Some(0));
    assert_eq!(ok(&installation, &["tag", "busybox", "other:1"]), "Tagged busybox as other:1\n");
    let tagged = shown(&installation, &["tag", "--json", "other:1", "third"]);
    assert_eq!((&tagged["tag"], &tagged["source"]), (&json!("third"), &json!("tag")));
    let listed = ok(&installation, &["ls", "-q"]);
    let mut tags: Vec<&str> = listed.lines().collect();
    tags.sort_unstable();
    assert_eq!(tags, ["busybox", "other:1", "third"]);
    let table = ok(&installation, &["ls"]);
    let id = &tagged["digest"].as_str().unwrap()[7..19];
    assert!(table.lines().next().unwrap().contains("IMAGE ID") && table.contains(id), "{table}");
    assert_eq!(blobs(&installation).len(), 1);
    // A tag that meant another image: that one's blob goes, nobody wants it any more.
    import(&installation, &["third"], "x");
    assert_eq!(blobs(&installation).len(), 2);
    ok(&installation, &["tag", "busybox", "third"]);
    assert_eq!(blobs(&installation).len(), 1);
    let failed = fails(&installation, &["tag", "none", "busybox"]);
    assert_eq!(text(&failed.stderr), "matchlock: image not found: \"none\"\n");
    let bad = installation.output(&["image", "tag", "busybox", "../x"]).unwrap();
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad.stderr));
    // Several at once; one that is not there keeps none of the others.
    let failed = fails(&installation, &["rm", "busybox", "none", "other:1"]);
    assert_eq!(text(&failed.stdout), "Removed busybox\nRemoved other:1\n");
    assert_eq!(blobs(&installation).len(), 1);
    let removed = shown(&installation, &["rm", "--json", "third"]);
    assert_eq!((&removed[0]["tag"], &removed[0]["blob_removed"]), (&json!("third"), &json!(true)));
    assert!(blobs(&installation).is_empty());
}

#[test]
fn gc_takes_what_no_image_needs_and_says_what_it_could_not_see() {
    let installation = Installation::bare().unwrap();
    let nothing = ok(&installation, &["gc"]);
    assert_eq!(nothing, "Removed 0 unreferenced blobs\n");
    import(&installation, &["kept"], "kept");
    let kept = blobs(&installation);
    // What a crash leaves: a blob without a row, and the directory of an import.
    let left = kept[0].with_file_name(format!("sha256_{}.erofs", "a".repeat(64)));
    std::fs::write(&left, "x").unwrap();
    let half = installation.cache().join("images/tmp/0123");
    std::fs::create_dir_all(half.join("rootfs/a")).unwrap();
    let would = shown(&installation, &["gc", "--dry-run", "--json"]);
    let kinds: Vec<&Value> =
        would["removed"].as_array().unwrap().iter().map(|g| &g["kind"]).collect();
    assert_eq!(kinds, ["temporary", "blob"], "{would}");
    assert!(left.try_exists().unwrap() && half.try_exists().unwrap());
    let did = ok(&installation, &["gc"]);
    assert!(did.starts_with("Removed 1 unreferenced blobs\nRemoved 1 remains of"), "{did}");
    assert_eq!(blobs(&installation), kept);
    assert!(!half.try_exists().unwrap());
    // Without metadata nobody knows what is wanted: that is not "clean", and nothing goes.
    for name in ["metadata.db", "metadata.db-wal", "metadata.db-shm"] {
        let path = installation.cache().join("images").join(name);
        if path.try_exists().unwrap() {
            std::fs::remove_file(path).unwrap();
        }
    }
    for args in [&["gc"][..], &["gc", "--dry-run"], &["gc", "--json"]] {
        let failed = fails(&installation, args);
        assert!(text(&failed.stderr).contains("metadata.db"), "{}", text(&failed.stderr));
    }
    std::fs::write(installation.cache().join("images/metadata.db"), "no database at all").unwrap();
    let failed = fails(&installation, &["gc"]);
    assert!(text(&failed.stderr).contains("metadata.db"), "{}", text(&failed.stderr));
    assert_eq!(blobs(&installation), kept);
}

#[test]
fn a_root_filesystem_without_a_tag_is_refused_in_one_line() {
    let installation = Installation::bare().unwrap();
    let output = start_import(&installation, &[], "x").wait(crate::PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.lines().last().unwrap().contains("say which tag it gets"), "{said}");
    for (flag, value) in [("--platform", "linux"), ("--change", "RUN x")] {
        let bad = installation.output(&["image", "import", "x", flag, value]).unwrap();
        assert_eq!(bad.status.code(), Some(2), "{}", text(&bad.stderr));
        assert!(text(&bad.stderr).contains(value), "{}", text(&bad.stderr));
    }
}

/// Eight processes that import and collect at once: in the end each row has its blob, and a last
/// collection leaves nothing else.
#[test]
fn imports_and_collections_at_once_lose_nothing() {
    let installation = Installation::bare().unwrap();
    for round in 0..4 {
        let mut running: Vec<Running> = (0..5)
            .map(|number| {
                // Two make the same content under two tags, and each tag gets another each round.
                let content = format!("{} {round}", number / 2);
                start_import(&installation, &[&format!("tag-{number}")], &content)
            })
            .collect();
        let gc: &[&str] = if round == 3 { &["gc"] } else { &["image", "gc"] };
        running.extend((0..3).map(|_| installation.start(gc).unwrap()));
        for one in running {
            let output = one.wait(crate::PATIENCE).unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        }
        let images = shown(&installation, &["ls", "--json"]);
        let tags: Vec<&str> =
            images.as_array().unwrap().iter().map(|i| i["tag"].as_str().unwrap()).collect();
        assert_eq!(tags.len(), 5, "{images}");
        for one in shown(&installation, &[&["inspect"], &tags[..]].concat()).as_array().unwrap() {
            let path = Path::new(one["rootfs_path"].as_str().unwrap());
            assert!(path.metadata().is_ok_and(|found| found.len() > 0), "{one}");
        }
    }
    ok(&installation, &["gc"]);
    assert_eq!(blobs(&installation).len(), 3);
    assert_eq!(installation.cache().join("images/tmp").read_dir().unwrap().count(), 0);
}
