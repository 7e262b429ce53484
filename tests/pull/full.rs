//! A cache on a disk that is too small: 16 MB, in a mount namespace that ends with the commands in it.

use std::process::{Command, Output};

use matchlock_test_support::registry::FakeRegistry;
use matchlock_test_support::{Installation, program};

use super::{assert_nothing_of_images_left, layer, stderr, stdout};

/// Runs a script with the cache on such a disk; `matchlock` and `pull` are functions.
fn on_a_small_disk(installation: &Installation, host: &str, script: &str) -> Output {
    let program = program().unwrap();
    let script = format!(
        r#"set -u
        mkdir -p "$MATCHLOCK_CACHE" && mount -t tmpfs -o size=16m tmpfs "$MATCHLOCK_CACHE" || exit 9
        cd "$MATCHLOCK_CACHE"
        matchlock() {{ "{}" -q "$@"; }}
        pull() {{ matchlock pull --insecure-registry {host} {host}/$1; }}
        {script}"#,
        program.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    installation.prepare(&mut command).output().unwrap()
}

fn registry(megabytes: &[usize]) -> FakeRegistry {
    let registry = FakeRegistry::new().unwrap();
    for (name, size) in ["a", "b"].iter().zip(megabytes) {
        registry.image(name, "1", "amd64", &[layer(name, size << 20)]);
    }
    registry
}

#[test]
fn pulls_that_do_not_fit_leave_nothing_that_is_half() {
    let registry = registry(&[12, 13]);
    let installation = Installation::bare().unwrap();
    let script = r#"
        pull a:1 & pull b:1; wait
        # Whoever had no room for the download has begun no build.
        mkdir -p images/tmp
        find images/content/partial images/tmp -type f
        matchlock image gc >/dev/null; echo "gc $?"
        find images -type f -size +500k"#;
    let output = on_a_small_disk(&installation, &registry.host(), script);
    assert_eq!(stdout(&output), "gc 0\n", "{}", stderr(&output));
    let said = stderr(&output);
    assert_eq!(said.lines().count(), 2, "{said}");
    for line in said.lines() {
        assert!(line.contains("no space in") && line.contains("matchlock image gc"), "{said}");
    }
    assert_nothing_of_images_left(&installation);
}

#[test]
fn what_is_half_is_removed_where_nothing_more_can_be_written() {
    let registry = registry(&[1]);
    let installation = Installation::bare().unwrap();
    // As of a pull that was killed; then the disk is filled up.
    let script = r#"
        pull a:1 >/dev/null; echo "pull $?"
        half=images/content/partial/sha256_$(printf '%064d' 1)
        mkdir -p images/content/partial
        cat /dev/zero >$half 2>/dev/null
        test $(stat -f -c %a .) = 0; echo "full $?"
        matchlock image ls | wc -l
        matchlock image gc >/dev/null; echo "gc $?"
        test -e $half; echo "left $?"
        cat /dev/zero >other 2>/dev/null
        matchlock image ls | wc -l
        matchlock image gc >/dev/null; echo "gc $?""#;
    let output = on_a_small_disk(&installation, &registry.host(), script);
    let expected = "pull 0\nfull 0\n1\ngc 0\nleft 1\n1\ngc 0\n";
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), (expected, ""));
}
