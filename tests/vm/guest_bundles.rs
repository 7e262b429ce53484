//! Guest bundles that machines boot from: in use, named by hand, and our own kernel's.

use std::io::Write as _;
use std::process::Output;

use matchlock_test_support::netns::TestNet;
use matchlock_test_support::{Installation, put_bundle};
use rustix::process::Signal;

use super::{PATIENCE, network, stderr, stdout};

/// What the release of our own kernel ends with (guest/kernel/x86_64.config).
const OWN: &str = "-matchlock";

/// The bundle that the other tests boot.
fn default_bundle() -> (String, String) {
    let bundles = Installation::new().unwrap().bundles().unwrap();
    let found =
        bundles.into_iter().find(|(_, _, is_default)| *is_default).expect("a default bundle");
    (found.0, found.1)
}

/// The bundle with our own kernel, if there is one; else it is said that `test` was not run. To stderr
/// itself: what a test prints is only shown when it fails.
fn own_bundle(test: &str) -> Option<(String, String)> {
    let bundles = Installation::new().unwrap().bundles().unwrap();
    let found = bundles.into_iter().rfind(|(_, release, _)| release.ends_with(OWN));
    if found.is_none() {
        let line = format!(
            "NOT RUN: {test}: there is no kernel of our own; build it with `make kernel`\n"
        );
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    found.map(|(version, release, _)| (version, release))
}

fn assert_ran(output: &Output, wanted: &str) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    assert_eq!(stdout(output), wanted);
}

#[test]
fn a_bundle_in_use_is_not_removed() {
    let (version, release) = default_bundle();
    let installation = Installation::with_own_bundle(&version).unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    put_bundle(installation.cache(), "1-other").unwrap();
    assert_eq!(installation.output(&["guest", "use", "1-other"]).unwrap().status.code(), Some(0));
    let refused = installation.output(&["guest", "rm", &version]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let wanted = format!("matchlock: guest bundle {version} is in use by a running VM: ");
    assert!(stderr(&refused).starts_with(&wanted), "{}", stderr(&refused));
    // The machine has noticed nothing.
    assert_ran(
        &installation.output(&["exec", &vm, "--", "uname", "-r"]).unwrap(),
        &format!("{release}\n"),
    );
    run.signal(Signal::TERM).unwrap();
    assert_eq!(run.wait(PATIENCE).unwrap().status.code(), Some(143));
    let removed = installation.output(&["guest", "rm", &version]).unwrap();
    assert_ran(&removed, &format!("Removed {version}\n"));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_kernel_can_be_named() {
    let (version, release) = default_bundle();
    let installation = Installation::new().unwrap();
    let file = installation.home().with_file_name("a kernel");
    std::fs::copy(installation.cache().join("guest").join(version).join("kernel"), &file).unwrap();
    let file = file.to_str().unwrap();
    assert_ran(
        &installation.run(&["--kernel", file], &["uname", "-r"]).unwrap(),
        &format!("{release}\n"),
    );
    let mut command =
        installation.command(&["run", "--no-network", "--image", "busybox", "--", "true"]).unwrap();
    let refused = command.env("MATCHLOCK_KERNEL", "/nowhere/kernel").output().unwrap();
    assert_eq!(refused.status.code(), Some(125));
    let said = stderr(&refused);
    let wanted = "the guest kernel /nowhere/kernel is not a readable file: correct --kernel or \
                  MATCHLOCK_KERNEL";
    assert!(said.contains(wanted), "{said}");
    installation.assert_nothing_left().unwrap();
}

/// What a container engine needs of its kernel. Each is looked at by using it or by what the kernel says.
const CONTAINERS: &str = r#"
    set -e
    for fs in overlay erofs fuse ext4 cgroup2 squashfs; do grep -qw $fs /proc/filesystems; done
    for ns in user pid net mnt uts ipc cgroup time; do test -e /proc/self/ns/$ns; done
    for c in cpu memory io pids cpuset; do grep -qw $c /sys/fs/cgroup/cgroup.controllers; done
    for c in NF_TABLES NFT_COMPAT NFT_MASQ BRIDGE_NETFILTER IP_NF_NAT VETH BRIDGE OVERLAY_FS SECCOMP_FILTER
    do zcat /proc/config.gz | grep -qx CONFIG_$c=y; done
    test ! -e /proc/modules
    grep -q Seccomp /proc/self/status
    unshare -Urmnpf true
    ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br0
    mkdir -p /tmp/l /tmp/u /tmp/w /tmp/m; mount -t tmpfs none /tmp/u; mkdir /tmp/u/u /tmp/u/w
    mount -t overlay -o lowerdir=/tmp/l,upperdir=/tmp/u/u,workdir=/tmp/u/w none /tmp/m
    echo all there
"#;

#[test]
fn our_own_kernel_has_what_a_guest_needs() {
    let Some((version, release)) = own_bundle("our_own_kernel_has_what_a_guest_needs") else {
        return;
    };
    let installation = Installation::with_own_bundle(&version).unwrap();
    let output = installation.run(&[], &["sh", "-c", CONTAINERS]).unwrap();
    assert_ran(&output, "all there\n");
    // The NIC, and the ways out of a machine.
    let flags = [
        "run",
        "--image",
        "busybox",
        "--",
        "sh",
        "-c",
        "ip addr show eth0 | grep -c 'inet '; uname -r",
    ];
    let net = TestNet::new().unwrap();
    assert_ran(&network::output(&net, &installation, &flags), &format!("1\n{release}\n"));
    installation.assert_nothing_left().unwrap();
}

/// Its initramfs has no modules, and the other's has: each kernel boots with either where that can be.
#[test]
fn our_own_kernel_ignores_the_modules_of_another() {
    let Some((own, release)) = own_bundle("our_own_kernel_ignores_the_modules_of_another") else {
        return;
    };
    let installation = Installation::new().unwrap();
    let guest = installation.cache().join("guest");
    let bundles = installation.bundles().unwrap();
    // A cache that is kept has those of earlier builds too.
    let (stock, ..) = bundles
        .into_iter()
        .filter(|(_, release, _)| !release.ends_with(OWN))
        .max_by_key(|(version, ..)| guest.join(version).metadata().unwrap().modified().unwrap())
        .expect("a stock bundle");
    let mut command = installation
        .command(&["run", "--no-network", "--image", "busybox", "--", "uname", "-r"])
        .unwrap();
    command.env("MATCHLOCK_KERNEL", guest.join(own).join("kernel"));
    command.env("MATCHLOCK_INITRAMFS", guest.join(stock).join("initramfs"));
    assert_ran(&command.output().unwrap(), &format!("{release}\n"));
    installation.assert_nothing_left().unwrap();
}
