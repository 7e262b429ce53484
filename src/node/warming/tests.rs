//! Against a fleet that stands in for the real one, in time that passes only when nobody has anything
//! to do: a minute takes no time.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use matchlock_actors::fleet::FleetMsg;
use matchlock_actors::handle::ServiceSlot;
use matchlock_actors::root::{Services, Slots};
use matchlock_actors::vm::PhaseFollower;
use matchlock_model::id::{Generation, VmId};
use matchlock_model::phase::Phase;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::watch;
use tracing::Level;
use tracing::subscriber::DefaultGuard;

use matchlock_actors::fleet::VmHandle;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;

use super::*;

/// More than a template waits, and less than anything here lasts.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Keeps its templates coming up until it is told what becomes of them.
#[derive(Debug, Clone, Default)]
struct Vms(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    made: Mutex<Vec<(CreateVm, watch::Sender<VmView>)>>,
    stopped: Mutex<Vec<(VmId, StopMode)>>,
    refuses: AtomicBool,
}

impl Actor for Vms {
    type Msg = FleetMsg;
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<FleetMsg>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<FleetMsg>,
        message: FleetMsg,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        match message {
            FleetMsg::CreateVm { reply, .. } if self.0.refuses.load(Ordering::Relaxed) => {
                reply.send(Err(Failure::new(FailureKind::Busy, "as many as there may be")))?;
            }
            FleetMsg::CreateVm { create, reply } => reply.send(Ok(self.add(*create)))?,
            FleetMsg::StopVm { id, mode, reply } => {
                self.0.stopped.lock().unwrap().push((id, mode));
                reply.send(Ok(self.handle_of(id)))?;
                self.becomes(number(id), |_| {});
            }
            other => panic!("unexpected {other:?}"),
        }
        Ok(())
    }
}

fn id(number: usize) -> VmId {
    VmId::new(number.try_into().unwrap())
}

fn number(of: VmId) -> usize {
    of.number().try_into().unwrap()
}

impl Vms {
    fn add(&self, create: CreateVm) -> VmHandle {
        let mut made = self.0.made.lock().unwrap();
        let id = id(made.len());
        let view = watch::Sender::new(VmView {
            id,
            generation: Generation::default(),
            phase: Phase::Starting,
            cause: None,
            settled: false,
            cleaned_up: false,
            timings: Timings::default(),
        });
        made.push((create, view));
        drop(made);
        self.handle_of(id)
    }

    fn handle_of(&self, id: VmId) -> VmHandle {
        let view = self.0.made.lock().unwrap()[number(id)].1.subscribe();
        VmHandle { id, view, phases: PhaseFollower::of_nobody() }
    }

    /// The template with this number has come to its end, which is like this.
    fn becomes(&self, number: usize, end: impl FnOnce(&mut VmView)) {
        self.0.made.lock().unwrap()[number].1.send_modify(|view| {
            (view.phase, view.settled, view.cleaned_up) = (Phase::Cleaned, true, true);
            end(view);
        });
    }

    fn is_saved(&self, number: usize) {
        self.becomes(number, |view| view.timings.saved = Some(A_MOMENT));
    }

    fn is_in_vain(&self, number: usize) {
        let cause = Failure::new(FailureKind::Guest, "it would not be held");
        self.becomes(number, |view| view.cause = Some(cause));
    }

    /// How much memory each has that was made, once all is quiet.
    async fn made(&self) -> Vec<u64> {
        sleep(A_MOMENT).await;
        let made = self.0.made.lock().unwrap();
        made.iter().map(|(create, _)| create.spec.memory_mb).collect()
    }
}

/// What was logged, line by line.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// What this module has said since the last call.
    fn said(&self) -> Vec<String> {
        let said = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
        let ours = said.lines().filter(|line| line.contains("node::warming:"));
        ours.map(|line| line.trim_start().replace("matchlock::node::warming: ", "")).collect()
    }
}

/// A node of which these are the VMs.
struct World {
    vms: Vms,
    warming: Warming,
    log: Log,
    /// Dropped, it would say that there will be no other fleet.
    _fleet: ServiceSlot<FleetMsg>,
    /// In each test: of a place that logs the first thread that comes there decides for all others
    /// whether anybody listens.
    _logged: DefaultGuard,
}

impl World {
    async fn new() -> Self {
        let log = Log::default();
        let writer = log.clone();
        let format = tracing_subscriber::fmt().with_ansi(false).without_time();
        let logger =
            format.with_max_level(Level::DEBUG).with_writer(move || writer.clone()).finish();
        let logged = tracing::subscriber::set_default(logger);
        let vms = Vms::default();
        let slot = ServiceSlot::new("the fleet");
        let (actor, _) = Actor::spawn(None, vms.clone(), ()).await.unwrap();
        slot.set(Some(actor));
        let services = Services { fleet: slot.handle(), ..Slots::default().services() };
        let warming = Warming::new(NodeClient::new(services), true);
        Self { vms, warming, log, _fleet: slot, _logged: logged }
    }
}

/// The template of VMs with so much memory.
fn of(memory_mb: u64) -> Option<Template> {
    let (kernel, initramfs) = (PathBuf::from("/kernel"), PathBuf::from("/initramfs"));
    let shape = Shape { vcpus: 1, memory_mb, nic: true, kernel, initramfs };
    Some(Template { shape, guest_lease: None })
}

#[tokio::test(start_paused = true)]
async fn a_template_is_made_a_while_after_its_vm_and_only_where_none_is() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    warming.make(None);
    assert!(vms.made().await.is_empty());
    warming.make(of(256));
    sleep(HEAD_START - Duration::from_millis(1)).await;
    assert!(vms.0.made.lock().unwrap().is_empty());
    assert_eq!(vms.made().await, [256]);
    let made = vms.0.made.lock().unwrap();
    let (create, _) = &made[0];
    assert_eq!(create.start, StartMode::Template { anew: false });
    assert_eq!((create.spec.vcpus(), create.spec.network.is_some()), (1, true));
    assert_eq!((&*create.kernel, &*create.initramfs), ("/kernel".as_ref(), "/initramfs".as_ref()));
}

#[tokio::test(start_paused = true)]
async fn one_that_came_to_nothing_is_tried_again_after_a_minute_and_not_before() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    let began = Instant::now();
    warming.make(of(256));
    assert_eq!(vms.made().await, [256]);
    vms.is_in_vain(0);
    assert_eq!(vms.made().await, [256]);
    warming.make(of(256));
    assert_eq!(vms.made().await, [256], "at once");
    // What keeps that one from being made may be its own matter.
    warming.make(of(512));
    assert_eq!(vms.made().await, [256, 512]);
    vms.is_in_vain(1);
    tokio::time::sleep_until(began + TRY_AGAIN - A_MOMENT).await;
    warming.make(of(256));
    assert_eq!(vms.made().await, [256, 512], "within the minute");
    tokio::time::sleep_until(began + TRY_AGAIN + A_MOMENT).await;
    warming.make(of(256));
    assert_eq!(vms.made().await, [256, 512, 256], "after the minute");
    vms.is_in_vain(2);
    assert_eq!(vms.made().await.len(), 3);
    warming.make(of(256));
    assert_eq!(vms.made().await, [256, 512, 256], "the minute begins anew");
}

#[tokio::test(start_paused = true)]
async fn one_that_the_fleet_refuses_is_tried_again_after_a_minute() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    vms.0.refuses.store(true, Ordering::Relaxed);
    warming.make(of(256));
    sleep(A_MOMENT).await;
    vms.0.refuses.store(false, Ordering::Relaxed);
    warming.make(of(256));
    assert!(vms.made().await.is_empty(), "at once");
    sleep(TRY_AGAIN).await;
    warming.make(of(256));
    assert_eq!(vms.made().await, [256]);
}

#[tokio::test(start_paused = true)]
async fn one_that_was_made_may_be_made_again_at_once() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    for made in 0..3 {
        warming.make(of(256));
        assert_eq!(vms.made().await, vec![256; made + 1]);
        vms.is_saved(made);
        assert_eq!(vms.made().await, vec![256; made + 1]);
    }
}

#[tokio::test(start_paused = true)]
async fn one_is_made_at_a_time() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    warming.make(of(256));
    warming.make(of(512));
    assert_eq!(vms.made().await, [256], "while the first waits");
    warming.clone().make(of(512));
    assert_eq!(vms.made().await, [256], "while the first boots");
    vms.is_in_vain(0);
    assert_eq!(vms.made().await, [256]);
    // That it was not made then was no attempt.
    warming.make(of(512));
    assert_eq!(vms.made().await, [256, 512]);
}

#[tokio::test(start_paused = true)]
async fn the_end_takes_down_what_was_begun_and_begins_nothing() {
    for is_up in [false, true] {
        let world = World::new().await;
        let World { vms, warming, .. } = &world;
        warming.make(of(256));
        if is_up {
            assert_eq!(vms.made().await, [256]);
        }
        warming.end();
        tokio::time::timeout(A_MOMENT, warming.ended()).await.unwrap();
        let stopped = vms.0.stopped.lock().unwrap().clone();
        let expected = if is_up { vec![(id(0), StopMode::Force)] } else { Vec::new() };
        assert_eq!(stopped, expected);
        warming.make(of(512));
        assert_eq!(vms.made().await.len(), usize::from(is_up));
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_is_not_over_before_the_template_is_gone() {
    let world = World::new().await;
    let World { vms, warming, .. } = &world;
    warming.make(of(256));
    assert_eq!(vms.made().await, [256]);
    let waited = tokio::time::timeout(A_MOMENT, warming.ended()).await;
    assert!(waited.is_err(), "it is still there");
}

#[tokio::test(start_paused = true)]
async fn off_or_for_a_vm_that_is_not_to_start_warm_there_is_no_template() {
    let world = World::new().await;
    let is_wanted = |warming: &Warming, start| {
        let mut create = of(256).unwrap().create().unwrap();
        create.start = start;
        warming.template_for(&create).map(|template| template.shape)
    };
    let on = &world.warming;
    let off = Warming::new(on.0.client.clone(), false);
    assert_eq!(is_wanted(on, StartMode::Warm), of(256).map(|template| template.shape));
    assert_eq!(is_wanted(&off, StartMode::Warm), None);
    assert_eq!(is_wanted(on, StartMode::Cold), None);
    assert_eq!(is_wanted(on, StartMode::Template { anew: true }), None);
    let restored = Timings { restore: Some(A_MOMENT), ..Timings::default() };
    assert!(of(256).unwrap().if_booted(&restored).is_none());
    assert!(of(256).unwrap().if_booted(&Timings::default()).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_becomes_of_a_template_is_told_to_those_who_debug() {
    let world = World::new().await;
    let World { vms, warming, log, .. } = &world;
    warming.make(of(256));
    assert_eq!(vms.made().await.len(), 1);
    assert!(log.said().is_empty());
    vms.is_saved(0);
    assert_eq!(vms.made().await.len(), 1);
    let expected = format!("INFO made a snapshot for the next VMs vm_id={}", id(0));
    assert_eq!(log.said(), [expected]);

    warming.make(of(256));
    assert_eq!(vms.made().await.len(), 2);
    vms.is_in_vain(1);
    assert_eq!(vms.made().await.len(), 2);
    let said = log.said();
    let is_told = |line: &str| line.starts_with("DEBUG no snapshot is made ");
    assert!(said.len() == 1 && is_told(&said[0]), "{said:?}");
    assert!(said[0].contains(&id(1).to_string()), "{said:?}");
    assert!(said[0].contains("it would not be held"), "{said:?}");

    vms.0.refuses.store(true, Ordering::Relaxed);
    warming.make(of(512));
    sleep(A_MOMENT).await;
    let said = log.said();
    assert!(said.len() == 1 && is_told(&said[0]), "{said:?}");
    assert!(said[0].contains("as many as there may be"), "{said:?}");

    // Something that is left is not only for those who debug.
    vms.0.refuses.store(false, Ordering::Relaxed);
    warming.make(of(1024));
    assert_eq!(vms.made().await.len(), 3);
    vms.becomes(2, |view| view.cleaned_up = false);
    assert_eq!(vms.made().await.len(), 3);
    let said = log.said();
    assert!(said.len() == 2 && said[0].starts_with("ERROR of a template: VM"), "{said:?}");
    assert!(said[0].contains("run `matchlock"), "{said:?}");
    assert!(is_told(&said[1]), "{said:?}");
}
