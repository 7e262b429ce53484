//! A scenario in which one VM has all the bad luck.

use std::sync::Arc;
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_actors::vm::StartMode;
use matchlock_model::phase::Phase;
use matchlock_model::vm::StopMode;
use ractor::ActorCell;
use tokio::time::sleep;

use super::node::Node;
use super::scenario::{Game, UNDISTURBED};
use super::strangers::squatter;
use super::world::{Sim, lock};

/// One VM has all the bad luck: the others notice nothing.
pub(crate) async fn one_is_unlucky(sim: &Arc<Sim>) {
    let game = Game::new(sim);
    lock(&sim.plan).on = false;
    let node = game.boot().await.expect("without a fault");
    if game.below(2) == 0 {
        let start = StartMode::Template { anew: false };
        game.clone().create(Arc::clone(&node), true, start).await;
        sleep(UNDISTURBED).await;
    }
    let warm = StartMode::Warm;
    let victim = game.clone().create(Arc::clone(&node), false, warm).await;
    let victim = victim.expect("without a fault");
    let mut lucky = Vec::new();
    for _ in 0..=game.below(3) {
        lucky.extend(game.clone().create(Arc::clone(&node), true, warm).await);
    }
    sleep(UNDISTURBED).await;
    if victim.view.borrow().phase != Phase::Running {
        // Its id is that of somebody's link.
        if victim.id != squatter().vm {
            sim.trace.broken(format_args!("{} does not run without a fault", victim.id));
        }
        return game.finish().await;
    }
    let spared: Vec<_> = node.vm_actors().iter().skip(1).map(ActorCell::get_id).collect();
    {
        let mut plan = lock(&sim.plan);
        plan.target = Some(victim.id);
        plan.on = true;
    }
    let mut late = None;
    for round in 0..8 {
        let what = game.below(40);
        sim.disturb_guest(victim.id, what);
        if game.below(3) == 0 {
            tokio::spawn(game.clone().stop(Arc::clone(&node), victim.id, game.mode()));
        }
        // Its actor is killed, life after life.
        let of_victim =
            node.vm_actors().into_iter().filter(|cell| !spared.contains(&cell.get_id()));
        if round != 7 {
            of_victim.for_each(|cell| cell.kill());
        }
        if round == 7 {
            late = game.clone().create(Arc::clone(&node), true, warm).await;
        }
        let pause = sim.rng().up_to(Duration::from_secs(3));
        sleep(pause).await;
    }
    sleep(UNDISTURBED).await;
    for vm in lucky.into_iter().chain(late) {
        game.check_lucky(&node, vm).await;
    }
    game.finish().await;
}

impl Game {
    /// A VM that nothing was done to runs, until it is told to stop; and then leaves nothing.
    async fn check_lucky(&self, node: &Arc<Node>, vm: VmHandle) {
        if vm.id == squatter().vm {
            return;
        }
        let view = vm.view.borrow().clone();
        let link = node.link(vm.id).await;
        if view.phase != Phase::Running || !matches!(link, Ok(Ok(()))) {
            let text = format!("{} was disturbed by another VM: {view:?} {link:?}", vm.id);
            self.sim.trace.broken(text);
        }
        self.check_answered(node, "stop", &node.stop(vm.id, StopMode::Force).await);
        // Not awaited: two who wait for one view wake in random order.
        sleep(UNDISTURBED).await;
        let view = vm.view.borrow().clone();
        if !(view.settled && view.cleaned_up && view.cause.is_none()) {
            self.sim.trace.broken(format_args!("{} did not end as it should: {view:?}", vm.id));
        }
    }
}
