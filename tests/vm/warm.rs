//! Starts from a snapshot: that they are, that no two share what makes a machine, and that nothing
//! that is wrong about a snapshot is more than a boot and a line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use matchlock_test_support::netns::{HOST, PUBLIC, TestNet};
use matchlock_test_support::{Installation, Running};

use super::image_config::{busybox_files, import};
use super::inside::{MOUNTS, PRINT_MOUNTS};
use super::terminal::{a_session, on_terminal, run_args};
use super::{PATIENCE, network, stderr, stdout};

/// What is logged of a start from a snapshot, and of one that had to boot.
pub(super) const WARM: &str = "started from a snapshot";
const BOOTS: &str = "boots: it could not go on from a snapshot";

/// An installation with a cache of its own: other tests boot.
pub(super) fn installation() -> Installation {
    Installation::with_own_cache().unwrap()
}

fn make_warm(installation: &Installation) -> PathBuf {
    let made = installation.output(&["warm", "--no-network"]).unwrap();
    assert_eq!((made.status.code(), &*stdout(&made)), (Some(0), "Warm\n"), "{}", stderr(&made));
    installation.assert_nothing_left().unwrap();
    let found = snapshots(installation);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

/// All that is in the directory of snapshots.
fn snapshots(installation: &Installation) -> Vec<PathBuf> {
    let dir = fs::read_dir(installation.cache().join("snapshots")).unwrap();
    dir.map(|entry| entry.unwrap().path()).collect()
}

/// A run of which it is told how it began.
pub(crate) fn run(installation: &Installation, flags: &[&str], script: &str) -> Output {
    let head = ["run", "--no-network", "--image", "busybox"].into_iter();
    let args: Vec<&str> =
        head.chain(flags.iter().copied()).chain(["--", "sh", "-c", script]).collect();
    let output =
        installation.command(&args).unwrap().env("MATCHLOCK_LOG", "info").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    output
}

pub(crate) fn assert_warm(output: &Output) {
    let said = stderr(output);
    assert!(said.contains(WARM) && !said.contains(BOOTS), "{said}");
}

/// It booted, and one line says why not from the snapshot.
fn assert_boots(output: &Output, why: &str) {
    let said = stderr(output);
    let lines: Vec<_> = said.lines().filter(|line| line.contains(BOOTS)).collect();
    assert!(lines.len() == 1 && lines[0].contains(why) && !said.contains(WARM), "{said}");
}

/// No page of the guest's is one of another guest's: none is merged with equal ones, none is the snapshot's.
fn assert_has_its_memory_for_itself(hypervisor: Option<i64>) {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", hypervisor.unwrap())).unwrap();
    let mut mapping = "";
    let (mut resident_kb, mut guest) = (0_u64, false);
    for line in maps.lines() {
        if line.starts_with(|c: char| c.is_ascii_digit() || ('a'..='f').contains(&c)) {
            mapping = line;
        } else if let Some(size) = line.strip_prefix("Rss:") {
            resident_kb = size.trim().trim_end_matches(" kB").parse().unwrap();
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            guest |= resident_kb > 32 << 10;
            assert!(!flags.split(' ').any(|flag| flag == "mg"), "mergeable: {mapping}");
            assert!(!mapping.contains("/snapshots/"), "the snapshot itself: {mapping}");
        }
    }
    assert!(guest, "the guest's memory is not there: {maps}");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it is time itself that must pass")]
fn two_vms_of_one_snapshot_share_nothing_that_makes_a_machine() {
    let installation = installation();
    let snapshot = make_warm(&installation);
    for (file, mode) in [(&snapshot, 0o700), (&snapshot.join("memory"), 0o600)] {
        let found =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).unwrap().permissions());
        assert_eq!(found & 0o777, mode, "{}", file.display());
    }
    // The clock must not be the template's, and two starts must not be in one second.
    std::thread::sleep(Duration::from_secs(3));
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname
        for random in /dev/urandom /dev/random; do head -c 16 $random | od -An -tx1; done
        [ -e /dev/hwrng ] && head -c 16 /dev/hwrng | od -An -tx1
        grep btime /proc/stat; date +%s";
    let said: Vec<Vec<String>> = (0..2)
        .map(|_| {
            let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
            let before = now();
            let output = run(&installation, &[], script);
            let after = now();
            assert_warm(&output);
            let mut lines: Vec<_> = stdout(&output).lines().map(str::to_owned).collect();
            let date: u64 = lines.pop().unwrap().parse().unwrap();
            let is_right = before <= date + 1 && date <= after;
            assert!(is_right, "its clock says {date}, between {before} and {after}");
            std::thread::sleep(Duration::from_millis(1100));
            lines
        })
        .collect();
    // The hardware's numbers are there with our own kernel only.
    assert!(said[0].len() >= 6 && said[0].len() == said[1].len(), "{said:?}");
    for (one, other) in said[0].iter().zip(&said[1]) {
        assert_ne!(one, other, "{said:?}");
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_warm_vm_is_like_any_other_and_cold_boots() {
    let installation = installation();
    make_warm(&installation);
    // Its own disks, whatever the template had.
    let disk =
        run(&installation, &["--disk-size", "300"], "df -m / | awk 'END {print $2}'; ls /bin/sh");
    assert_warm(&disk);
    let (size, shell) =
        stdout(&disk).split_once('\n').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!((200..=300).contains(&size.parse::<u32>().unwrap()), "{size} MB");
    assert_eq!(shell, "/bin/sh\n");
    let mounts = run(&installation, &[], PRINT_MOUNTS);
    assert_warm(&mounts);
    assert_eq!(stdout(&mounts).lines().collect::<Vec<_>>(), MOUNTS);
    // Other machines have no snapshot: no word of one.
    for flags in [&["--cold"][..], &["--memory", "400"]] {
        let booted = run(&installation, flags, "true");
        assert!(!stderr(&booted).contains("snapshot"), "{}", stderr(&booted));
    }
    let timed = installation.run(&["--timings"], &["true"]).unwrap();
    let restore = stderr(&timed)
        .lines()
        .find(|line| line.starts_with("matchlock: restore "))
        .unwrap()
        .to_owned();
    assert!(restore.contains(" ms "), "{restore}");
    // In the background, with further commands and with a shutdown that syncs.
    let started = installation
        .output(&["run", "-d", "--no-network", "--image", "busybox", "--", "sleep", "1000"])
        .unwrap();
    let vm = stdout(&started).trim().to_owned();
    let shown = installation.output(&["inspect", &vm]).unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["vm"]["started"], "restored", "{shown}");
    assert_eq!(shown["lifecycle"]["resources"]["started"], "restored", "{shown}");
    assert_has_its_memory_for_itself(shown["lifecycle"]["resources"]["hypervisor"]["pid"].as_i64());
    let exec =
        installation.output(&["exec", &vm, "--", "sh", "-c", "echo $((6*7)); hostname"]).unwrap();
    assert_eq!(stdout(&exec), format!("42\n{vm}\n"), "{}", stderr(&exec));
    let removed = installation.output(&["rm", "--force", &vm]).unwrap();
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn shells_on_terminals_are_in_a_warm_vm_what_they_are_in_any_other() {
    let installation = installation();
    make_warm(&installation);
    let flags = ["-it", "--timings", "-e", "PS1=ready> "];
    let mut shell = on_terminal(&installation, &run_args(&flags, &["sh"]));
    a_session(&mut shell);
    shell.keys("exit 7\r").unwrap();
    assert_eq!(shell.finish().unwrap(), Some(7));
    let printed = String::from_utf8_lossy(shell.output()).into_owned();
    let is_restored = |line: &str| line.starts_with("matchlock: restore ") && line.contains(" ms ");
    assert!(printed.lines().any(is_restored), "{printed}");
    installation.assert_nothing_left().unwrap();

    let started = run(&installation, &["-d"], "sleep 1000");
    let vm = stdout(&started).trim().to_owned();
    let exec = ["exec", "-it", "-e", "PS1=ready> ", &vm, "--", "sh"];
    let mut shell = on_terminal(&installation, &exec);
    a_session(&mut shell);
    shell.keys("exit 9\r").unwrap();
    assert_eq!(shell.finish().unwrap(), Some(9));
    let removed = installation.output(&["rm", "--force", &vm]).unwrap();
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_is_wrong_about_a_snapshot_is_a_boot_and_a_line() {
    let installation = installation();
    let snapshot = make_warm(&installation);
    let (memory, record) = (snapshot.join("memory"), snapshot.join("snapshot.json"));
    let (bytes, text) = (fs::read(&memory).unwrap(), fs::read_to_string(&record).unwrap());
    let mut damaged = bytes.clone();
    *damaged.get_mut(bytes.len() / 2).unwrap() ^= 1;
    let stale = text.replace("\"boot_id\": \"", "\"boot_id\": \"0");
    assert_ne!(stale, text);
    type Wrong<'a> = (&'a Path, &'a [u8], &'a str);
    let wrong: [Wrong<'_>; 5] = [
        (&memory, &damaged, "sha256"),
        (&memory, &bytes[..bytes.len() / 2], "bytes instead of"),
        (&memory, b"", "bytes instead of"),
        (&record, b"{", "damaged"),
        (&record, stale.as_bytes(), "started anew"),
    ];
    for (file, content, why) in wrong {
        let whole = fs::read(file).unwrap();
        fs::write(file, content).unwrap();
        assert_boots(&run(&installation, &[], "true"), why);
        fs::write(file, whole).unwrap();
    }
    // As it was it is used; stale, `gc` takes it away, and there is nothing to tell any more.
    assert_warm(&run(&installation, &[], "true"));
    fs::write(&record, stale).unwrap();
    let gc = installation.output(&["gc"]).unwrap();
    assert_eq!(gc.status.code(), Some(0), "{}", stderr(&gc));
    assert_eq!(snapshots(&installation), Vec::<PathBuf>::new());
    let booted = run(&installation, &[], "true");
    assert!(!stderr(&booted).contains("snapshot"), "{}", stderr(&booted));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_template_that_somebody_ends_is_no_success() {
    let installation = installation();
    let mut command = installation.command(&["warm", "--no-network"]).unwrap();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let warm = Running::start(&mut command).unwrap();
    installation.wait_for_template().unwrap();
    let killed = installation.output(&["kill", "--all"]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    let warm = warm.wait(PATIENCE).unwrap();
    assert_eq!((warm.status.code(), &*stdout(&warm)), (Some(1), ""));
    let said = stderr(&warm);
    assert!(said.contains("ended by somebody else before it was saved"), "{said}");
    assert_eq!(snapshots(&installation), Vec::<PathBuf>::new());
    installation.assert_nothing_left().unwrap();
}

#[test]
fn an_image_with_a_machine_id_gives_each_vm_one_of_its_own() {
    let installation = Installation::with_own_cache().unwrap();
    let made = installation.output(&["warm", "--no-network"]).unwrap();
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    let directory = tempfile::tempdir().unwrap();
    let (root, files) = (directory.path().join("root"), directory.path().join("files.tar"));
    fs::create_dir_all(root.join("etc")).unwrap();
    let of_the_image = "0123456789abcdef0123456789abcdef\n";
    fs::write(root.join("etc/machine-id"), of_the_image).unwrap();
    fs::write(&files, busybox_files()).unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.arg("-rf").arg(&files).arg("-C").arg(&root).arg("etc/machine-id");
    assert!(tar.status().unwrap().success());
    import(&installation, &["with-id"], &fs::read(&files).unwrap());
    let ids: Vec<String> = [&[][..], &[], &["--cold"]]
        .into_iter()
        .map(|flags: &[&str]| {
            let head = ["run", "--no-network", "--image", "with-id"].into_iter();
            let args: Vec<&str> =
                head.chain(flags.iter().copied()).chain(["--", "cat", "/etc/machine-id"]).collect();
            let mut command = installation.command(&args).unwrap();
            let output = command.env("MATCHLOCK_LOG", "info").output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            assert_eq!(stderr(&output).contains(WARM), flags.is_empty(), "{}", stderr(&output));
            stdout(&output)
        })
        .collect();
    let is_id = |id: &str| id.len() == 33 && id.trim_end().bytes().all(|b| b.is_ascii_hexdigit());
    assert!(ids.iter().all(|id| is_id(id) && id != of_the_image), "{ids:?}");
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[2] != ids[0], "{ids:?}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_warm_vm_has_a_network_of_its_own() {
    let (net, installation) = (TestNet::new().unwrap(), installation());
    let made = network::output(&net, &installation, &["warm"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    network::assert_nothing_left(&net, &installation);
    let script = format!(
        "ip -o link show eth0 | grep -o 'mtu [0-9]*'; cat /sys/class/net/eth0/address
         wget -qO- http://{PUBLIC}/; wget -qO- http://any.test/; ip -o -4 addr show eth0 | grep -o '192[0-9.]*'"
    );
    let detached = ["run", "-d", "--image", "busybox", "--", "sleep", "1000"];
    let started = network::output(&net, &installation, &detached);
    let vm = stdout(&started).trim().to_owned();
    let other = network::run(&net, &installation, &["--timings", "--mtu", "1400"], &script);
    assert_eq!(other.status.code(), Some(0), "{}", stderr(&other));
    let said = stderr(&other);
    let is_restored = |line: &str| line.starts_with("matchlock: restore ") && line.contains(" ms ");
    assert!(said.lines().any(is_restored), "{said}");
    let kept = network::output(&net, &installation, &["exec", &vm, "--", "sh", "-c", &script]);
    let removed = network::output(&net, &installation, &["rm", "--force", &vm]);
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    let lines = |output: &Output| -> Vec<String> {
        let lines: Vec<_> = stdout(output).lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 6, "{lines:?}: {}", stderr(output));
        lines
    };
    let (kept, other) = (lines(&kept), lines(&other));
    let peer = format!("peer {HOST}");
    assert_eq!((&*kept[0], &kept[2], &kept[3]), ("mtu 1500", &peer, &peer), "{kept:?}");
    assert_eq!((&*other[0], &other[2], &other[3]), ("mtu 1400", &peer, &peer), "{other:?}");
    assert_ne!(kept[1], other[1], "one MAC for two");
    assert_ne!(kept[4], other[4], "one address for two");
    network::assert_nothing_left(&net, &installation);
}
