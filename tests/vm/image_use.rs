//! Images in use: what a VM runs from stays, whatever others do meanwhile.

use std::path::Path;
use std::process::Command;

use matchlock_test_support::{Installation, debian_archive, wait_until};
use serde_json::Value;

use super::image_config::{busybox_files, import};
use super::{stderr, stdout};

fn ok(installation: &Installation, args: &[&str]) -> String {
    let output = installation.output(args).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn json(installation: &Installation, args: &[&str]) -> Value {
    serde_json::from_str(&ok(installation, args)).unwrap()
}

/// The files of busybox, and one more that takes so much room that nobody has all of it in memory by
/// chance of the boot.
fn with_ballast(number: u8) -> (Vec<u8>, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.tar");
    std::fs::write(&path, busybox_files()).unwrap();
    let ballast: Vec<u8> =
        (0..24_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ number).collect();
    std::fs::write(directory.path().join("ballast"), &ballast).unwrap();
    let mut command = Command::new("tar");
    command.arg("-rf").arg(&path).arg("-C").arg(directory.path()).arg("ballast");
    assert!(command.status().unwrap().success());
    use sha2::Digest as _;
    (std::fs::read(&path).unwrap(), hex::encode(sha2::Sha256::digest(&ballast)))
}

#[test]
fn an_image_outlives_all_that_others_do_while_a_vm_runs_from_it() {
    let installation = Installation::without_images().unwrap();
    let (files, sha) = with_ballast(1);
    import(&installation, &["tool:1"], &files);
    let args = ["run", "-d", "--rm", "--no-network", "--image", "tool:1", "--", "sleep", "100000"];
    let vm = ok(&installation, &args).trim_end().to_owned();
    let shown = json(&installation, &["image", "inspect", "tool:1"]);
    assert_eq!(shown[0]["used_by"], serde_json::json!([vm]), "{shown}");
    let blob = shown[0]["rootfs_path"].as_str().unwrap().to_owned();

    // Its only tag does not go, one of two does.
    let refused = installation.output(&["image", "rm", "tool:1"]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("in use"), "{}", stderr(&refused));
    ok(&installation, &["image", "tag", "tool:1", "tool:2"]);
    assert_eq!(ok(&installation, &["image", "rm", "tool:1"]), "Removed tool:1\n");
    // The tag gets another image: the blob is nobody's but the VM's.
    import(&installation, &["tool:2"], &with_ballast(2).0);
    for args in [&["gc"][..], &["prune"], &["image", "gc"]] {
        ok(&installation, args);
    }
    let found = json(&installation, &["image", "gc", "--dry-run", "--json"]);
    assert_eq!(found["in_use"][0]["path"], blob.as_str(), "{found}");
    assert_eq!(found["removed"], serde_json::json!([]), "{found}");

    // Read anew, not from what was in memory.
    let args = [
        "exec",
        "-u",
        "0",
        &vm,
        "--",
        "sh",
        "-c",
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum /ballast",
    ];
    assert_eq!(ok(&installation, &args), format!("{sha}  /ballast\n"));
    ok(&installation, &["kill", &vm]);
    wait_until(super::PATIENCE, "the VM's end", || Ok(installation.list()?.is_empty())).unwrap();
    let would = ok(&installation, &["image", "gc", "--dry-run"]);
    assert!(would.starts_with("Would remove 1 unreferenced blobs\nWould free "), "{would}");
    assert!(Path::new(&blob).try_exists().unwrap());
    let did = ok(&installation, &["image", "gc"]);
    assert!(did.starts_with("Removed 1 unreferenced blobs\nFreed "), "{did}");
    assert!(!Path::new(&blob).try_exists().unwrap());
    // The other image is whole.
    let args = ["run", "--no-network", "--image", "tool:2", "--", "sha256sum", "/ballast"];
    assert!(ok(&installation, &args).ends_with("  /ballast\n"));
    installation.assert_nothing_left().unwrap();
}

/// An image of 120 layers, made by umoci.
#[test]
fn an_image_of_120_layers_boots() {
    const LAYERS: usize = 120;
    let installation = Installation::without_images().unwrap();
    let place = tempfile::tempdir().unwrap();
    let umoci = |args: &[&str]| {
        let output = Command::new("umoci").args(args).current_dir(place.path()).output().unwrap();
        assert!(output.status.success(), "umoci {args:?}: {}", stderr(&output));
    };
    umoci(&["init", "--layout", "layout"]);
    umoci(&["new", "--image", "layout:many"]);
    umoci(&["insert", "--image", "layout:many", "/bin/busybox", "/bin/busybox"]);
    for number in 2..=LAYERS {
        let file = place.path().join("file");
        std::fs::write(&file, format!("layer {number}\n")).unwrap();
        // One file of its own, and one that every layer replaces.
        let target = if number % 2 == 0 { format!("/{number}") } else { "/latest".to_owned() };
        umoci(&["insert", "--image", "layout:many", "file", &target]);
    }
    umoci(&["config", "--image", "layout:many", "--config.entrypoint", "/bin/busybox"]);
    let mut command = Command::new("tar");
    let archive =
        command.args(["-c", "-C", "layout", "."]).current_dir(place.path()).output().unwrap();
    let imported = import(&installation, &["--json"], &archive.stdout);
    let imported: Value = serde_json::from_slice(&imported.stdout).unwrap();
    assert_eq!(imported[0]["layers"].as_array().unwrap().len(), LAYERS);
    assert_eq!(imported[0]["tags"], serde_json::json!(["many"]));
    let args = ["run", "--no-network", "--image", "many", "--", "cat", "/2", "/120", "/latest"];
    assert_eq!(ok(&installation, &args), "layer 2\nlayer 120\nlayer 119\n");
    installation.assert_nothing_left().unwrap();
}

/// A Debian of debootstrap, as the tar of its files.
#[test]
fn debian_boots_with_apt_and_python() {
    let archive = debian_archive().unwrap();
    let installation = Installation::without_images().unwrap();
    let mut command =
        installation.command(&["image", "import", "debian", "-c", "CMD [\"bash\"]"]).unwrap();
    let imported = command.stdin(archive).output().unwrap();
    assert_eq!(imported.status.code(), Some(0), "{}", stderr(&imported));
    let script = "apt-get --version | head -n 1; python3 --version; id -un; \
                  stat -c '%U %G %a' /usr/bin/passwd /tmp /var/mail; dpkg --verify";
    let args = [
        "run",
        "--no-network",
        "--memory",
        "1024",
        "--image",
        "debian",
        "--",
        "bash",
        "-c",
        script,
    ];
    let printed = ok(&installation, &args);
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines[0].starts_with("apt 2.") && lines[1].starts_with("Python 3."), "{printed}");
    let rest = ["root", "root root 4755", "root root 1777", "root mail 2775"];
    // `dpkg --verify` names each file that is not as its package says: none.
    assert_eq!(lines[2..], rest, "{printed}");
    installation.assert_nothing_left().unwrap();
}
