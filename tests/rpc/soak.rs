//! Many VMs in one session, of which some crash all the time: `make soak PART=session`.

use std::time::{Duration, Instant};

use matchlock_test_support::{Installation, Session, small_vm};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{close, rpc, text};

const VMS: usize = 30;

fn minutes() -> u64 {
    let text = std::env::var("MATCHLOCK_SOAK_MINUTES").expect("run `make soak PART=session`");
    text.parse().unwrap()
}

fn resident_kb(session: &Session) -> u64 {
    let path = format!("/proc/{}/status", session.pid().unwrap());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// VMs that come up side by side, as many as this.
fn create(session: &mut Session, count: usize) -> Vec<String> {
    let asked: Vec<u64> =
        (0..count).map(|_| session.send("create", &small_vm()).unwrap()).collect();
    let came = asked.into_iter().map(|id| session.answer(id).unwrap().unwrap());
    came.map(|created| created["id"].as_str().unwrap().to_owned()).collect()
}

/// One command in each VM at once; all must answer.
fn round(session: &mut Session, vms: &[String]) -> usize {
    let asked: Vec<(u64, &String)> = vms
        .iter()
        .map(|vm| {
            let params = json!({ "vm_id": vm, "command": "hostname" });
            (session.send("exec", &params).unwrap(), vm)
        })
        .collect();
    for (id, vm) in &asked {
        let result = session.answer(*id).unwrap();
        let result = result.unwrap_or_else(|error| panic!("a healthy VM's call failed: {error:?}"));
        assert_eq!(text(&result["stdout"]), format!("{vm}\n"));
    }
    asked.len()
}

#[test]
#[ignore = "`make soak PART=session`"]
fn healthy_vms_notice_nothing_of_those_that_crash() {
    let until = Instant::now() + Duration::from_secs(minutes() * 60);
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let mut vms = Vec::new();
    while vms.len() < VMS {
        vms.extend(create(&mut session, 5));
    }
    let (mut calls, mut crashes, mut memory) = (0, 0, Vec::new());
    let mut seed = 88_172_645_463_325_252_u64;
    while Instant::now() < until {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let doomed = vms.swap_remove(usize::try_from(seed % vms.len() as u64).unwrap());
        let params = json!({ "vm_id": doomed, "command": "sleep 1000" });
        let lost = session.send("exec", &params).unwrap();
        // While healthy VMs answer, it goes.
        let remains = installation.remains().unwrap();
        let (pid, _) = remains.processes.iter().find(|(_, line)| line.contains(&doomed)).unwrap();
        kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
        calls += round(&mut session, &vms);
        let (code, message) = session.answer(lost).unwrap().unwrap_err();
        assert!(code == -32000 && message.contains(&doomed), "{code} {message}");
        crashes += 1;
        vms.extend(create(&mut session, 1));
        calls += round(&mut session, &vms);
        let events = session.seen();
        assert!(events.iter().all(|m: &Value| m["method"] == "event"), "{events:?}");
        memory.push(resident_kb(&session));
    }
    assert_eq!(vms.len(), VMS);
    // Flat: the last quarter is no larger than the second by more than some pages.
    let quarter = memory.len() / 4;
    let largest = |part: &[u64]| part.iter().max().copied().unwrap_or_default();
    let (early, late) =
        (largest(&memory[quarter..quarter * 2]), largest(&memory[memory.len() - quarter..]));
    println!("{calls} calls, {crashes} crashes; {early} kB resident early, {late} kB late");
    assert!(quarter == 0 || late < early + early / 4, "memory has grown: {memory:?}");
    close(session, &installation);
}
