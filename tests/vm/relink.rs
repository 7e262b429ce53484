//! The link to a guest is cut in the middle of commands: its sockets are shut down, as a hypervisor would
//! that loses them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};

use matchlock_test_support::{Installation, wait_until};
use rustix::net::{Shutdown, SocketAddrUnix, getpeername, shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::inside::{self, end, waiting_vm};
use super::{PATIENCE, stderr, stdout};

/// Shuts down the owner's socket to the guest; false while it has none, or has ended.
fn cut(owner: i32) -> bool {
    let process = Pid::from_raw(owner).unwrap();
    let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else { return false };
    let Ok(open) = std::fs::read_dir(format!("/proc/{owner}/fd")) else { return false };
    for entry in open {
        let number: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // One that was closed meanwhile is not it.
        let Ok(file) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        let Ok(Some(peer)) = getpeername(&file) else { continue };
        let Ok(peer) = SocketAddrUnix::try_from(peer) else { continue };
        let is_link = peer.path_bytes().is_some_and(|path| path.ends_with(b"link.sock"));
        if is_link {
            // One that has ended meanwhile, by a cut before this one, is not connected any more.
            return shutdown(&file, Shutdown::Both).is_ok();
        }
    }
    false
}

fn exec(installation: &Installation, args: &[&str]) -> Child {
    let mut command = installation.command(args).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command.spawn().unwrap()
}

/// Waits until the command whose output nobody reads has filled whatever is on the way.
fn wait_until_it_stands(installation: &Installation, vm: &str) {
    let mut before = String::new();
    wait_until(PATIENCE, "a command that waits for its reader", || {
        let now = inside::exec(installation, vm, "wc -c </tmp/said");
        Ok(std::mem::replace(&mut before, now.clone()) == now)
    })
    .unwrap();
}

#[test]
fn a_link_that_is_cut_is_begun_anew_and_commands_go_on_byte_for_byte() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let listed = installation.output(&["list", "--json"]).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&stdout(&listed)).unwrap();
    let owner = i32::try_from(rows[0]["pid"].as_i64().unwrap()).unwrap();
    // Out of the guest: numbered lines, more than all buffers on the way hold.
    let count = 60_000;
    let script = format!("seq 1 {count} | sed 's/$/ {}/' | tee /tmp/said; exit 7", "x".repeat(80));
    let mut lines = exec(&installation, &["exec", &vm, "--", "sh", "-c", &script]);
    // And into it.
    let mut typed = exec(&installation, &["exec", "-i", &vm, "--", "sha256sum"]);
    let mut stdin = typed.stdin.take().unwrap();
    let mut sent = Vec::new();
    let mut cuts = 0;
    let output = BufReader::new(lines.stdout.take().unwrap());
    for (number, line) in output.lines().enumerate() {
        let expected = format!("{} {}", number + 1, "x".repeat(80));
        assert_eq!(line.unwrap(), expected);
        if number % 100 == 0 {
            let part: Vec<u8> = (0..=250).cycle().skip(number % 251).take(8192).collect();
            stdin.write_all(&part).unwrap();
            sent.extend(part);
        }
        // Four times, which is less often than is given up after, and with all buffers full: what was
        // received and not delivered is neither to be lost nor to come twice.
        if number % (count / 5) == count / 10 && number < count * 4 / 5 {
            wait_until_it_stands(&installation, &vm);
            wait_until(PATIENCE, "a link to cut", || Ok(cut(owner))).unwrap();
            cuts += 1;
        }
    }
    assert_eq!((lines.wait().unwrap().code(), cuts), (Some(7), 4));
    drop(stdin);
    let output = typed.wait_with_output().unwrap();
    let sum = stdout(&output);
    assert_eq!(sum.split(' ').next().unwrap(), sha256(&sent), "{}", stderr(&output));
    end(&installation, &vm);
}

#[test]
fn a_vm_whose_link_is_cut_again_and_again_is_given_up() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "100000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let owner = run.pid().unwrap().as_raw_nonzero().get();
    let mut cuts = 0;
    let given_up = || {
        // Only one that works: one that is cut while it begins is given up for that.
        let works = installation.output(&["exec", &vm, "--", "true"])?.status.success();
        cuts += usize::from(works && cut(owner));
        Ok(installation.list()?.is_empty())
    };
    wait_until(PATIENCE, "the end of the VM", given_up).unwrap();
    assert!(cuts > 5, "given up after {cuts} cuts");
    let output = run.wait(PATIENCE).unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("link to the guest was lost"), "{said}");
    installation.assert_nothing_left().unwrap();
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(bytes))
}
