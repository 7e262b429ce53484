//! Beside the rules that docker and firewalld make: what they keep guests from is said, what helps
//! against it helps, and nothing that we refuse gets through theirs.

use std::fs;

use matchlock_host::firewall::{Firewall as _, LinuxFirewall, Obstacle};

use crate::data_path::{INTERNET, Outcome, PORT, PRIVATE, World, all, call, masqueraded};

/// As docker 28 makes it with iptables-nft, with a container's port published.
const DOCKER: &str = "
    table ip nat {
        chain DOCKER {
            iifname docker0 return
            iifname != docker0 tcp dport 8081 dnat to 10.1.1.1:8080
        }
        chain PREROUTING {
            type nat hook prerouting priority dstnat; policy accept;
            fib daddr type local jump DOCKER
        }
        chain POSTROUTING {
            type nat hook postrouting priority srcnat; policy accept;
            ip saddr 172.17.0.0/16 oifname != docker0 masquerade
        }
    }
    table ip filter {
        chain DOCKER { iifname != docker0 oifname docker0 drop; }
        chain DOCKER-BRIDGE { oifname docker0 jump DOCKER; }
        chain DOCKER-CT { oifname docker0 ct state related,established accept; }
        chain DOCKER-ISOLATION-STAGE-2 { oifname docker0 drop; }
        chain DOCKER-ISOLATION-STAGE-1 {
            iifname docker0 oifname != docker0 jump DOCKER-ISOLATION-STAGE-2
        }
        chain DOCKER-FORWARD {
            jump DOCKER-CT
            jump DOCKER-ISOLATION-STAGE-1
            jump DOCKER-BRIDGE
            iifname docker0 accept
        }
        chain DOCKER-USER { }
        chain FORWARD {
            type filter hook forward priority filter; policy drop;
            jump DOCKER-USER
            jump DOCKER-FORWARD
        }
    }";

/// As firewalld makes it, with the host's link in its public zone.
const FIREWALLD: &str = "
    table inet firewalld {
        chain filter_INPUT {
            type filter hook input priority filter + 10; policy accept;
            ct state { established, related } accept
            iifname lo accept
            ct state invalid drop
            iifname up0 tcp dport 22 accept
            reject with icmpx admin-prohibited
        }
        chain filter_FORWARD_ZONES { }
        chain filter_FORWARD {
            type filter hook forward priority filter + 10; policy accept;
            ct state { established, related } accept
            ct status dnat accept
            iifname lo accept
            ct state invalid drop
            jump filter_FORWARD_ZONES
            reject with icmpx admin-prohibited
        }
    }";

/// Docker's rules with what `Obstacle` says helps: iptables' `fc-+` is nft's `fc-*`.
const DOCKER_OPENED: [&str; 2] = [
    "add rule ip filter DOCKER-USER iifname fc-* accept",
    "add rule ip filter DOCKER-USER oifname fc-* accept",
];

/// What an interface in firewalld's trusted zone gets.
const FIREWALLD_OPENED: [&str; 1] =
    ["add rule inet firewalld filter_FORWARD_ZONES iifname fc-* accept"];

fn load(world: &World, rules: &'static str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, rules).unwrap();
    world.host.program("nft", &format!("-f {}", file.path().display()));
}

fn obstacles(world: &World) -> Vec<Obstacle> {
    world.host.block_on(|| async { LinuxFirewall::new().obstacles().await.unwrap() })
}

/// `blocked` is what comes of a guest's call until `opening` is done; `what` and `hint` are said.
fn beside(
    rules: &'static str,
    blocked: &Outcome,
    (what, hint): (&str, &str),
    opening: &[&'static str],
) {
    let world = World::new();
    load(&world, rules);
    let _held = world.firewalls(false, false);
    assert_eq!(call(&world.guest, INTERNET, PORT), *blocked);
    let said = obstacles(&world);
    assert_eq!(said.iter().map(|o| o.what.as_str()).collect::<Vec<_>>(), [what]);
    assert!(said[0].why.contains(hint), "{}", said[0]);

    for rule in opening {
        world.host.program("nft", rule);
    }
    assert_eq!(call(&world.guest, INTERNET, PORT), masqueraded());
    assert_eq!(call(&world.other, INTERNET, PORT), masqueraded());
    // Their accept is no permission of ours, nor is the published port of a container.
    all(&world.guest, &[PRIVATE, &["192.168.101.2"]], &Outcome::Refused);
    assert_eq!(call(&world.guest, "203.0.113.1", 8081), Outcome::Refused);
}

#[test]
fn beside_docker() {
    let said = ("chain FORWARD of table ip filter", "DOCKER-USER");
    beside(DOCKER, &Outcome::Silence, said, &DOCKER_OPENED);
}

#[test]
fn beside_firewalld() {
    let said = ("table inet firewalld", "--zone=trusted --add-interface=fc-+");
    beside(FIREWALLD, &Outcome::Refused, said, &FIREWALLD_OPENED);
}
