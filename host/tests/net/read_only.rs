//! A host whose settings nobody can write: a container with its `/proc/sys` mounted read-only.

use std::path::Path;

use matchlock_host::firewall::{Firewall as _, FirewallError, LinuxFirewall};
use matchlock_host::tap::{LinuxTaps, TapError, TapSpec, Taps as _};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::firewall::spec;
use crate::namespace::{Namespace, mark};

const SYS: &str = "/proc/sys";

/// In a mount namespace of the namespace's own thread.
fn make_settings_read_only(namespace: &Namespace) {
    namespace.run(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let nowhere = None::<&Path>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nowhere, "/", nowhere, private, nowhere).unwrap();
        mount(Some(SYS), SYS, nowhere, MsFlags::MS_BIND, nowhere).unwrap();
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(nowhere, SYS, nowhere, read_only, nowhere).unwrap();
        assert!(std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").is_err());
    });
}

fn tap_spec() -> TapSpec {
    let mark = mark(1, 1);
    let gateway = "192.168.100.1".parse().unwrap();
    TapSpec { gateway, guest: spec(&mark).guest, mark, prefix: 24, mtu: 1500 }
}

#[test]
fn settings_that_are_off_and_cannot_be_written_are_one_line_that_says_what_to_do() {
    let namespace = Namespace::new();
    make_settings_read_only(&namespace);
    namespace.block_on(|| async {
        let refused = LinuxFirewall::new().enable_ip_forward().unwrap_err();
        assert!(matches!(refused, FirewallError::CannotForward(_)), "{refused}");
        let forward = refused.to_string();
        assert!(forward.contains("net.ipv4.ip_forward"), "{forward}");
        let refused = LinuxTaps::new().create(&tap_spec()).await.unwrap_err();
        assert!(matches!(refused, TapError::CannotDisableIpv6 { .. }), "{refused}");
        let ipv6 = refused.to_string();
        assert!(ipv6.contains("net.ipv6.conf.default.disable_ipv6"), "{ipv6}");
        for said in [forward, ipv6] {
            assert!(said.contains("--no-network") && said.lines().count() == 1, "{said}");
        }
    });
}

#[test]
fn settings_that_are_on_need_not_be_written() {
    let namespace = Namespace::new();
    namespace.run(|| {
        for setting in ["ipv4/ip_forward", "ipv6/conf/default/disable_ipv6"] {
            std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
        }
    });
    make_settings_read_only(&namespace);
    namespace.block_on(|| async {
        assert!(!LinuxFirewall::new().enable_ip_forward().unwrap());
        let tap = LinuxTaps::new().create(&tap_spec()).await.unwrap();
        assert_eq!(tap.name(), "fc-00000001");
    });
}
