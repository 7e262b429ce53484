//! What is missing or wrong on this host: one clear line, nothing left.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use matchlock_test_support::Installation;

use super::{stderr, stdout};

fn failed_run(installation: &Installation, env: &[(&str, &str)], flags: &[&str]) -> String {
    let mut args = vec!["run", "--no-network", "--image", "busybox"];
    args.extend(flags);
    args.extend(["--", "true"]);
    let mut command = installation.command(&args).unwrap();
    command.envs(env.iter().copied());
    let output = command.output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(stdout(&output).is_empty());
    if installation.home().join("state.db").try_exists().unwrap() {
        installation.assert_nothing_left().unwrap();
    }
    said
}

#[test]
fn no_qemu() {
    let installation = Installation::new().unwrap();
    let said = failed_run(&installation, &[("PATH", "/usr/sbin")], &[]);
    assert!(said.contains("qemu-system-x86_64 is not installed"), "{said}");
    assert!(said.contains("qemu-system-x86"), "{said}");
}

#[test]
fn no_kernel() {
    let installation = Installation::new().unwrap();
    let said = failed_run(&installation, &[("MATCHLOCK_KERNEL", "/nonexistent/vmlinux")], &[]);
    assert!(said.contains("/nonexistent/vmlinux"), "{said}");
}

#[test]
fn a_kernel_that_is_none() {
    let installation = Installation::new().unwrap();
    let kernel = installation.home().with_file_name("kernel");
    let env = [("MATCHLOCK_KERNEL", kernel.to_str().unwrap())];
    fs::write(&kernel, "not a kernel").unwrap();
    let said = failed_run(&installation, &env, &[]);
    assert!(said.contains("is not an ELF file: name a vmlinux"), "{said}");
    fs::write(&kernel, "\x7fELF, and nothing behind it").unwrap();
    let said = failed_run(&installation, &env, &[]);
    assert!(said.contains("before its agent was ready"), "{said}");
}

#[test]
fn not_enough_memory() {
    let installation = Installation::new().unwrap();
    let said = failed_run(&installation, &[], &["--memory", "16000000"]);
    assert!(said.contains("not enough memory") && said.contains("--memory"), "{said}");
}

/// A script to be named as the hypervisor.
fn hypervisor_script(installation: &Installation, text: &str) -> PathBuf {
    let program = installation.home().with_file_name("qemu");
    fs::write(&program, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
fn a_guest_that_never_gets_ready() {
    let installation = Installation::new().unwrap();
    // A hypervisor that starts and does nothing.
    let program = hypervisor_script(&installation, "exec sleep 1000\n");
    let env = [("MATCHLOCK_QEMU", program.to_str().unwrap()), ("MATCHLOCK_BOOT_TIMEOUT", "2")];
    let said = failed_run(&installation, &env, &[]);
    assert!(said.contains("never got ready") && said.contains("console"), "{said}");
}

#[test]
fn a_hypervisor_that_fails_at_once() {
    let installation = Installation::new().unwrap();
    let program = hypervisor_script(&installation, "echo 'no such machine' >&2\nexit 3\n");
    let said = failed_run(&installation, &[("MATCHLOCK_QEMU", program.to_str().unwrap())], &[]);
    assert!(said.contains("no such machine") && said.contains("exit status: 3"), "{said}");
}

#[test]
fn a_hypervisor_behind_a_script_that_waits_for_it_ends_with_its_vm() {
    let installation = Installation::new().unwrap();
    let program = hypervisor_script(&installation, "qemu-system-x86_64 \"$@\"\nexit $?\n");
    let command = ["run", "--no-network", "--image", "busybox", "--", "sh", "-c", "exit 7"];
    let mut command = installation.command(&command).unwrap();
    let output = command.env("MATCHLOCK_QEMU", &program).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_long_home_works() {
    let installation = Installation::new().unwrap();
    let deep = installation.home().join("d".repeat(120));
    let mut command =
        installation.command(&["run", "--no-network", "--image", "busybox", "--", "true"]).unwrap();
    let output = command.env("MATCHLOCK_HOME", &deep).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read_dir(deep.join("vms")).unwrap().count(), 0);
}
