//! Real guests on real networks, in network namespaces of the test's own: what they reach, what they
//! do not, and what is left when somebody dies.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Output, Stdio};

use matchlock_test_support::netns::{FORBIDDEN, HOST, INTERNET, PUBLIC, TestNet, megabyte};
use matchlock_test_support::{Installation, Running, program, wait_until};
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};

use super::{PATIENCE, stderr, stdout};

/// Tells for an address and port whether a connection is made, refused at once, or hangs.
const PROBE: &str = r#"
    probe() {
        said=$(nc -w 20 $1 $2 </dev/null 2>&1) && { echo "$1:$2 open"; return; }
        case $said in
            *refused*) echo "$1:$2 refused" ;;
            *) echo "$1:$2 $said" ;;
        esac
    }
"#;

/// The program on the host of this network.
pub(crate) fn command(net: &TestNet, installation: &Installation, args: &[&str]) -> Command {
    let mut command = net.command(program().unwrap().to_str().unwrap());
    installation.prepare(&mut command);
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn output(net: &TestNet, installation: &Installation, args: &[&str]) -> Output {
    command(net, installation, args).output().unwrap()
}

pub(crate) fn start(
    net: &TestNet,
    installation: &Installation,
    flags: &[&str],
    script: &str,
) -> Running {
    let args = run_args(flags, script);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Running::start(&mut command(net, installation, &args)).unwrap()
}

pub(crate) fn run(
    net: &TestNet,
    installation: &Installation,
    flags: &[&str],
    script: &str,
) -> Output {
    start(net, installation, flags, script).wait(PATIENCE).unwrap()
}

fn run_args(flags: &[&str], script: &str) -> Vec<String> {
    let script = format!("{PROBE}\n{script}");
    let head = ["run", "--image", "busybox"].into_iter().chain(flags.iter().copied());
    head.chain(["--", "sh", "-c", &script]).map(str::to_owned).collect()
}

pub(crate) fn assert_nothing_left(net: &TestNet, installation: &Installation) {
    assert_eq!(net.links_and_tables().unwrap(), Vec::<String>::new());
    assert_eq!(installation.sql("select * from subnet_allocations").unwrap(), "");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_guest_reaches_the_internet_masqueraded_and_nothing_else() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let forbidden: String =
        FORBIDDEN.iter().map(|address| format!("probe {address} 80\n")).collect();
    let script = format!(
        "ip -o link show eth0 | grep -o 'mtu [0-9]*'; cat /etc/resolv.conf; ip route
         wget -qO- http://{PUBLIC}/; wget -qO- http://{INTERNET}/; wget -qO- http://any.test/
         ping -c 1 -W 20 {PUBLIC} >/dev/null && echo pong
         {forbidden} probe {HOST} 80; probe 192.168.100.1 80; probe 192.168.100.1 22
         [ -e /proc/net/if_inet6 ] && grep eth0 /proc/net/if_inet6
         ip addr add 192.168.100.77/24 dev eth0
         ping -c 1 -W 3 -I 192.168.100.77 {PUBLIC} >/dev/null && echo spoofed; true"
    );
    let said = run(&net, &installation, &[], &script);
    assert_eq!(said.status.code(), Some(0), "{}", stderr(&said));
    let forbidden: String = FORBIDDEN.iter().map(|ip| format!("{ip}:80 refused\n")).collect();
    let expected = format!(
        "mtu 1500\nnameserver 8.8.8.8\nnameserver 8.8.4.4\n\
         default via 192.168.100.1 dev eth0 \n\
         192.168.100.0/24 dev eth0 scope link  src 192.168.100.2 \n\
         peer {HOST}\npeer {HOST}\npeer {HOST}\npong\n\
         {forbidden}{HOST}:80 refused\n192.168.100.1:80 refused\n192.168.100.1:22 refused\n"
    );
    assert_eq!(stdout(&said), expected, "{}", stderr(&said));
    // The first command of the host's own life turned forwarding on, and said so.
    assert!(stderr(&said).contains("net.ipv4.ip_forward"), "{}", stderr(&said));
    assert_eq!(net.peers(), vec![HOST; 3]);
    assert_nothing_left(&net, &installation);
}

#[test]
fn private_ranges_and_the_host_are_opened_each_alone_and_dns_works_wherever_it_is() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let private = FORBIDDEN[0];
    let script = format!(
        "nslookup -type=a any.test {private} | tail -n 2; probe {private} 80
         probe 169.254.169.254 80; probe 192.168.100.1 9"
    );
    net.listen_on_host(9).unwrap();
    let dns = format!("--dns-servers={private}");
    let closed = format!("Address: {PUBLIC}\n\n{private}:80 refused\n");
    let opened = format!("Address: {PUBLIC}\n\n{private}:80 open\n");
    for (flags, expected, host) in [
        (vec![&*dns], &closed, "refused"),
        (vec![&*dns, "--allow-private"], &opened, "refused"),
        (vec![&*dns, "--allow-host-access"], &closed, "open"),
    ] {
        let said = run(&net, &installation, &flags, &script);
        let expected = format!("{expected}169.254.169.254:80 refused\n192.168.100.1:9 {host}\n");
        assert_eq!(stdout(&said), expected, "{flags:?}: {}", stderr(&said));
    }
    assert_nothing_left(&net, &installation);
}

#[test]
fn two_vms_have_networks_of_their_own_and_do_not_meet() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let open = ["--rm=false", "--allow-private", "--allow-host-access"];
    let server = start(&net, &installation, &open, "nc -lk -p 80 -e echo hello");
    let vm = installation.wait_for_status("running").unwrap();
    let script =
        format!("ip route | grep -o 'src .*'; probe 192.168.100.2 80; wget -qO- http://{PUBLIC}/");
    let said = run(&net, &installation, &open[1..], &script);
    let expected = format!("src 192.168.101.2 \n192.168.100.2:80 refused\npeer {HOST}\n");
    assert_eq!(stdout(&said), expected, "{}", stderr(&said));
    // Another installation sees the first one's addresses, and neither harms the other.
    let other = Installation::new().unwrap();
    let said = run(&net, &other, &[], "ip route | grep -o 'src .*'");
    assert_eq!(stdout(&said), "src 192.168.101.2 \n", "{}", stderr(&said));
    assert_eq!(output(&net, &other, &["gc"]).status.code(), Some(0));
    let there =
        output(&net, &installation, &["exec", &vm, "--", "wget", "-qO-", "http://8.8.8.8/"]);
    assert_eq!(stdout(&there), format!("peer {HOST}\n"), "{}", stderr(&there));
    assert_eq!(output(&net, &installation, &["kill", &vm]).status.code(), Some(0));
    drop(server.wait(PATIENCE).unwrap());
    assert_eq!(output(&net, &installation, &["rm", &vm]).status.code(), Some(0));
    assert_nothing_left(&net, &installation);
}

/// The host remembers a connection longer than the VM lives that made it.
#[test]
fn what_was_sent_to_an_earlier_vm_does_not_reach_the_next() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let first =
        run(&net, &installation, &[], "nslookup -type=a stream.test >/dev/null; echo asked");
    assert_eq!(stdout(&first), "asked\n", "{}", stderr(&first));
    let script =
        "ip route | grep -o 'src .*'; sleep 2; grep Udp: /proc/net/snmp | cut -d ' ' -f 2,3";
    let second = run(&net, &installation, &[], script);
    let expected = "src 192.168.100.2 \nInDatagrams NoPorts\n0 0\n";
    assert_eq!(stdout(&second), expected, "{}", stderr(&second));
    assert_nothing_left(&net, &installation);
}

#[test]
fn packets_of_any_size_pass_with_a_small_mtu() {
    const MEGABYTES: u8 = 5;
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let script = format!(
        "ip -o link show eth0 | grep -o 'mtu [0-9]*'
         printf '\\005' | nc {PUBLIC} 81 > /tmp/got; sha256sum < /tmp/got
         nc {PUBLIC} 82 < /tmp/got"
    );
    let said = run(&net, &installation, &["--mtu", "1200"], &script);
    let bytes = megabyte().repeat(MEGABYTES.into());
    let expected = format!("mtu 1200\n{}  -\n", hex::encode(Sha256::digest(&bytes)));
    assert_eq!(stdout(&said), expected, "{}", stderr(&said));
    // The server may read the last of it a moment after the guest has sent it.
    wait_until(PATIENCE, "the upload", || Ok(!net.uploads().is_empty())).unwrap();
    assert!(net.uploads() == [bytes], "what came is not what was sent");
    assert_nothing_left(&net, &installation);
}

/// What two TAPs on one subnet do: replies of one VM go to the other's link, and are lost.
#[test]
fn a_stale_tap_on_the_wanted_subnet_is_reaped_and_a_strangers_is_avoided() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    assert_eq!(output(&net, &installation, &["gc"]).status.code(), Some(0));
    let install = std::fs::read_to_string(installation.home().join("install-id")).unwrap();
    let tap = |name: &str, mark: &str, address: &str| {
        format!(
            "ip tuntap add {name} mode tap; ip link set {name} alias '{mark}'
             ip addr add {address} dev {name}; ip link set {name} up\n"
        )
    };
    let ours = format!("matchlock:{}:vm-0badcafe", install.trim());
    let theirs = "matchlock:00112233aabbccdd:vm-0badbeef";
    net.sh(&tap("fc-0badcafe", &ours, "192.168.100.1/24")).unwrap();
    net.sh(&tap("fc-0badbeef", theirs, "192.168.101.1/24")).unwrap();
    net.sh("nft add table inet matchlock_fc-0badbeef").unwrap();
    let script = format!("ip route | grep -o 'src .*'; wget -qO- http://{PUBLIC}/");
    let first = start(&net, &installation, &["--rm=false"], &script);
    installation.wait_for_status("running").unwrap();
    let second = run(&net, &installation, &[], &script);
    assert_eq!(
        stdout(&second),
        format!("src 192.168.102.2 \npeer {HOST}\n"),
        "{}",
        stderr(&second)
    );
    first.signal(Signal::TERM).unwrap();
    let first = first.wait(PATIENCE).unwrap();
    assert_eq!(stdout(&first), format!("src 192.168.100.2 \npeer {HOST}\n"), "{}", stderr(&first));
    assert_eq!(output(&net, &installation, &["gc"]).status.code(), Some(0));
    let strangers = ["fc-0badbeef", "table inet matchlock_fc-0badbeef"];
    assert_eq!(net.links_and_tables().unwrap(), strangers);
}

#[test]
fn what_keeps_a_vm_from_its_network_is_said_in_one_line() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    // Everything else of the pool is in use.
    net.sh("ip addr add 10.77.0.1/30 dev lo").unwrap();
    let pool = |size: &str| format!("base=10.77.0.0/{size},size=30");
    let refused = |pool: &str| {
        let args = run_args(&[], "true");
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = command(&net, &installation, &args)
            .env("MATCHLOCK_SUBNET_POOL", pool)
            .output()
            .unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, said) = refused(&pool("30"));
    assert_eq!(code, Some(125));
    assert!(said.contains("no subnet is free") && said.contains("MATCHLOCK_SUBNET_POOL"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    // Rules that we cannot override are told, and the VM runs.
    net.sh("nft add table ip mine; nft add chain ip mine f '{type filter hook forward priority 0; policy drop;}'")
        .unwrap();
    let (code, said) = refused(&pool("29"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("table ip mine"), "{said}");
    assert_nothing_left(&net, &installation);
}

#[test]
fn without_the_privilege_the_line_names_what_needs_none() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let without = |flags: &[&str]| {
        let mut command = net.command("setpriv");
        command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
        installation.prepare(command.arg("--").arg(program().unwrap()));
        command.args(run_args(flags, "ls /sys/class/net")).output().unwrap()
    };
    let refused = without(&[]);
    assert_eq!(refused.status.code(), Some(125));
    let said = stderr(&refused);
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("--no-network"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let run = without(&["--no-network"]);
    assert_eq!(stdout(&run), "lo\n", "{}", stderr(&run));
    assert_nothing_left(&net, &installation);
}

/// Whoever may not look at tables has not made any, and says clean. Where somebody may have, it is not known.
#[test]
fn without_the_privilege_gc_is_clean_only_where_no_vm_had_a_network() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let gc = |flags: &[&str]| {
        let mut command = net.command("setpriv");
        command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
        installation.prepare(command.arg("--").arg(program().unwrap()));
        let output = command.arg("gc").args(flags).output().unwrap();
        (output.status.code(), stderr(&output))
    };
    installation.run(&[], &["true"]).unwrap();
    for flags in [&[][..], &["--dry-run"]] {
        assert_eq!(gc(flags).0, Some(0), "{flags:?}: {}", gc(flags).1);
    }
    // The VM is gone, row and all; what is left of it by a host that was restored is not known.
    let run = run(&net, &installation, &[], "true");
    assert_eq!(run.status.code(), Some(0), "{}", stderr(&run));
    for flags in [&[][..], &["--dry-run"]] {
        let (code, said) = gc(flags);
        assert_eq!(code, Some(1), "{flags:?}: {said}");
        let is_told = |line: &str| {
            line.starts_with("matchlock: could not look for") && line.contains("CAP_NET_ADMIN")
        };
        assert_eq!(said.lines().filter(|line| is_told(line)).count(), 1, "{flags:?}: {said}");
    }
    assert_eq!(output(&net, &installation, &["gc"]).status.code(), Some(0));
    assert_nothing_left(&net, &installation);
}

/// Others of the same network namespace may be choosing a subnet just now.
#[test]
fn a_run_takes_no_subnet_while_another_installation_chooses_one() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::new().unwrap());
    let choosing = net
        .on_host(|| {
            let name = SocketAddr::from_abstract_name("matchlock-subnets")?;
            let listener = UnixListener::bind_addr(&name)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
        .unwrap();
    let waiting = start(&net, &installation, &[], "ip route | grep -o 'src .*'");
    // Who wants the lock waits at its holder; that it takes nothing, it has time to disprove.
    let mut waiters = Vec::new();
    wait_until(PATIENCE, "somebody to want the lock", || {
        waiters.extend(choosing.accept().ok());
        Ok(!waiters.is_empty())
    })
    .unwrap();
    for _ in 0..20 {
        assert_eq!(net.links_and_tables().unwrap(), Vec::<String>::new());
        assert_eq!(installation.sql("select * from subnet_allocations").unwrap(), "");
    }
    drop((waiters, choosing));
    let said = waiting.wait(PATIENCE).unwrap();
    assert_eq!(stdout(&said), "src 192.168.100.2 \n", "{}", stderr(&said));
    assert_nothing_left(&net, &installation);
}
