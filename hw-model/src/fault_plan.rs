//! Fault injection: named points, and a plan of what happens at them.
//!
//! Every fallible step and every scheduling decision that matters has a [`Point`]. A device (or address space) is built
//! with [`Points`]; without a plan, meeting a point is one predictable branch. With one, the plan's [`Rule`]s say what
//! happens, in the words of Linux fault injection (Documentation/fault-injection/fault-injection.rst): skip, interval,
//! probability, times. There is no global state: two devices in one process have two plans, and the same seed fires the
//! same rules at the same visits.

mod subject;

pub use subject::{Direction, Only, Subject};

use crate::sync::{Arc, Mutex};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;

/// A named place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    name: &'static str,
    fallible: bool,
    /// Sweeps over the steps of a verb fail it in its turn.
    swept: bool,
}

impl Point {
    /// A step that can fail.
    #[must_use]
    pub const fn fallible(name: &'static str) -> Self {
        Self { name, fallible: true, swept: true }
    }
    /// A decision about order: it can be delayed or raced, not failed.
    #[must_use]
    pub const fn schedule(name: &'static str) -> Self {
        Self { name, fallible: false, swept: false }
    }
    /// Something that is no step of a verb and may happen there: a rule that fails it has it happen. Sweeps leave it out.
    #[must_use]
    pub const fn occasion(name: &'static str) -> Self {
        Self { name, fallible: true, swept: false }
    }
    /// Its name: words joined by dots, room first, as in `iommu.map`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }
    /// Whether the step can be made to fail.
    #[must_use]
    pub const fn is_fallible(self) -> bool {
        self.fallible
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// What the code at a point is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a point that is met and ignored injects nothing"]
pub enum Verdict {
    /// Go on.
    Go,
    /// Fail as this step fails in the world. Only fallible points are told so.
    Fail,
}

impl Verdict {
    /// Whether the step is to fail.
    #[must_use]
    #[inline]
    pub fn fails(self) -> bool {
        self == Self::Fail
    }
}

/// What a rule does.
#[derive(Clone)]
pub enum Action {
    /// The step fails. At a point that cannot fail, nothing happens.
    Fail,
    /// The calling thread sleeps. Not for simulated time: there, use [`Action::Run`].
    Delay(std::time::Duration),
    /// A closure runs at the point, on the thread that met it: for races on purpose. It must not meet the same plan.
    Run(Arc<dyn Fn(Point) + Send + Sync>),
}

impl fmt::Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fail => f.write_str("Fail"),
            Self::Delay(time) => write!(f, "Delay({time:?})"),
            Self::Run(_) => f.write_str("Run(..)"),
        }
    }
}

/// When something happens at which points.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The name of a point, or the beginning of names followed by `*`.
    pub point: String,
    /// What the visits that it looks at are about.
    pub only: Only,
    /// Visits that pass before the rule is looked at.
    pub skip: u64,
    /// Of the visits after those, every how-many-th counts; 1 is each.
    pub interval: u64,
    /// Of those, which share fires: 0.0 to 1.0.
    pub probability: f64,
    /// How often it fires at most; `None` is for ever. `Some(n)` with [`Action::Fail`] is "busy n times".
    pub times: Option<u64>,
    /// What happens then.
    pub action: Action,
}

impl Rule {
    /// A rule that acts at every visit of `point`.
    #[must_use]
    pub fn always(point: &str, action: Action) -> Self {
        let (only, point) = (Only::default(), point.to_owned());
        Self { point, only, skip: 0, interval: 1, probability: 1.0, times: None, action }
    }
    /// A rule that acts once, at visit number `nth` (the first is 1) of `point`.
    #[must_use]
    pub fn nth(point: &str, nth: u64, action: Action) -> Self {
        Self { skip: nth.saturating_sub(1), times: Some(1), ..Self::always(point, action) }
    }

    fn covers(&self, point: Point) -> bool {
        match self.point.strip_suffix('*') {
            Some(prefix) => point.name.starts_with(prefix),
            None => self.point == point.name,
        }
    }
}

/// What happens at points, and what has happened.
pub struct FaultPlan {
    state: Mutex<State>,
}

struct State {
    rules: Vec<RuleState>,
    random: ChaCha8Rng,
    /// Visits by point. A list: there are a few dozen points, and the list has room for them from the start, because
    /// points are met under locks that must not allocate.
    visits: Vec<(Point, u64)>,
    fallible_visits: u64,
    fail_visit: Option<u64>,
    failed_at: Option<Point>,
}

struct RuleState {
    rule: Rule,
    seen: u64,
    fired: u64,
}

/// Points that one plan can count.
const MAX_POINTS: usize = 256;

impl FaultPlan {
    /// A plan of `rules`; `seed` decides what probabilities decide.
    #[must_use]
    pub fn new(seed: u64, rules: Vec<Rule>) -> Arc<Self> {
        Self::with(seed, rules, None)
    }

    /// A plan that fails the `nth` visit of any fallible point (the first is 1), once: for sweeps over every step of a
    /// verb.
    #[must_use]
    pub fn fail_nth(nth: u64) -> Arc<Self> {
        Self::with(0, Vec::new(), Some(nth))
    }

    fn with(seed: u64, rules: Vec<Rule>, fail_visit: Option<u64>) -> Arc<Self> {
        let rules = rules.into_iter().map(|rule| RuleState { rule, seen: 0, fired: 0 }).collect();
        Arc::new(Self {
            state: Mutex::new(State {
                rules,
                random: ChaCha8Rng::seed_from_u64(seed),
                visits: Vec::with_capacity(MAX_POINTS),
                fallible_visits: 0,
                fail_visit,
                failed_at: None,
            }),
        })
    }

    fn visit(&self, point: Point, subject: &Subject) -> Verdict {
        let mut run: Option<Action> = None;
        let mut verdict = Verdict::Go;
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            state.count(point);
            if point.swept {
                state.fallible_visits += 1;
                if state.fail_visit == Some(state.fallible_visits) {
                    state.failed_at = Some(point);
                    verdict = Verdict::Fail;
                }
            }
            for rule in &mut state.rules {
                let meant = rule.rule.covers(point) && rule.rule.only.admits(subject);
                if !meant || !rule.decide(&mut state.random) {
                    continue;
                }
                match &rule.rule.action {
                    Action::Fail if point.fallible => verdict = Verdict::Fail,
                    Action::Fail => {}
                    action => run = Some(action.clone()),
                }
            }
        }
        match run {
            Some(Action::Delay(time)) => std::thread::sleep(time),
            Some(Action::Run(closure)) => closure(point),
            Some(Action::Fail) | None => {}
        }
        verdict
    }

    /// Visits of every point that was met, by name.
    #[must_use]
    pub fn visits(&self) -> Vec<(Point, u64)> {
        let mut visits = self.state.lock().visits.clone();
        visits.sort_by_key(|(point, _)| point.name);
        visits
    }

    /// How often each rule fired, in the order in which they were given. A rule that never did is a mistake of the plan
    /// or of the test.
    #[must_use]
    pub fn fired(&self) -> Vec<(String, u64)> {
        self.state.lock().rules.iter().map(|rule| (rule.rule.point.clone(), rule.fired)).collect()
    }

    /// Fails the `nth` visit of any fallible point from now on (the first is 1), once, as [`FaultPlan::fail_nth`] does from
    /// the start: so that a sweep can use one device for all its turns.
    pub fn fail_nth_from_now(&self, nth: u64) {
        let mut state = self.state.lock();
        state.fail_visit = Some(state.fallible_visits + nth);
        state.failed_at = None;
    }

    /// Fails nothing any more by number. Rules stay.
    pub fn disarm(&self) {
        self.state.lock().fail_visit = None;
    }

    /// Where [`FaultPlan::fail_nth`] struck, if it did.
    #[must_use]
    pub fn failed_at(&self) -> Option<Point> {
        self.state.lock().failed_at
    }
}

impl State {
    fn count(&mut self, point: Point) {
        if let Some((_, count)) = self.visits.iter_mut().find(|(known, _)| *known == point) {
            *count += 1;
        } else if self.visits.len() < MAX_POINTS {
            self.visits.push((point, 1));
        }
    }
}

impl RuleState {
    fn decide(&mut self, random: &mut ChaCha8Rng) -> bool {
        self.seen += 1;
        if self.seen <= self.rule.skip || self.rule.times.is_some_and(|times| self.fired >= times) {
            return false;
        }
        let counts = (self.seen - self.rule.skip - 1).is_multiple_of(self.rule.interval.max(1));
        let fires =
            counts && (self.rule.probability >= 1.0 || random.random::<f64>() < self.rule.probability);
        self.fired += u64::from(fires);
        fires
    }
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultPlan").field("fired", &self.fired()).finish()
    }
}

/// A device's connection to its plan, if it has one. Clones share the plan.
#[derive(Clone, Debug, Default)]
pub struct Points(Option<Arc<FaultPlan>>);

impl Points {
    /// Nothing is ever injected.
    pub const OFF: Self = Self(None);

    /// What `plan` says happens.
    #[must_use]
    pub fn with(plan: &Arc<FaultPlan>) -> Self {
        Self(Some(Arc::clone(plan)))
    }

    /// Whether there is no plan.
    #[must_use]
    #[inline]
    pub fn are_off(&self) -> bool {
        self.0.is_none()
    }

    /// Meets `point`.
    #[inline]
    pub fn meet(&self, point: Point) -> Verdict {
        match &self.0 {
            None => Verdict::Go,
            Some(plan) => Self::ask(plan, point, &Subject::default()),
        }
    }

    /// The same, where rules can ask what it is about. `subject` is called only if there is a plan.
    #[inline]
    pub fn meet_about(&self, point: Point, subject: impl FnOnce() -> Subject) -> Verdict {
        match &self.0 {
            None => Verdict::Go,
            Some(plan) => Self::ask(plan, point, &subject()),
        }
    }

    #[cold]
    #[inline(never)]
    fn ask(plan: &FaultPlan, point: Point, subject: &Subject) -> Verdict {
        plan.visit(point, subject)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicU64, Ordering};

    const MAP: Point = Point::fallible("iommu.map");
    const WAKE: Point = Point::schedule("engine.wake");

    fn fails(plan: &Arc<FaultPlan>, point: Point, visits: u64) -> Vec<u64> {
        let points = Points::with(plan);
        (1..=visits).filter(|_| points.meet(point).fails()).collect::<Vec<_>>()
    }

    #[test]
    fn the_nth_visit_fails_and_no_other() {
        let plan = FaultPlan::new(0, vec![Rule::nth("iommu.map", 7, Action::Fail)]);
        let points = Points::with(&plan);
        let failed: Vec<u64> = (1..=20).filter(|_| points.meet(MAP).fails()).collect();
        assert_eq!(failed, [7]);
        assert_eq!(plan.fired(), [("iommu.map".to_owned(), 1)]);
    }

    #[test]
    fn interval_and_times_count_as_in_the_kernel() {
        let rule = Rule { skip: 2, interval: 3, times: Some(2), ..Rule::always("iommu.*", Action::Fail) };
        let plan = FaultPlan::new(0, vec![rule]);
        assert_eq!(fails(&plan, MAP, 20), [3, 6]);
    }

    #[test]
    fn probability_follows_the_seed() {
        let rule = || vec![Rule { probability: 0.3, ..Rule::always("iommu.map", Action::Fail) }];
        let once = fails(&FaultPlan::new(5, rule()), MAP, 1000);
        assert_eq!(once, fails(&FaultPlan::new(5, rule()), MAP, 1000));
        assert_ne!(once, fails(&FaultPlan::new(6, rule()), MAP, 1000));
        assert!((200..400).contains(&once.len()), "{} of 1000 at 0.3", once.len());
    }

    #[test]
    fn a_schedule_point_never_fails_and_is_not_counted_by_a_sweep() {
        let plan = FaultPlan::fail_nth(1);
        let points = Points::with(&plan);
        assert!(!points.meet(WAKE).fails());
        assert!(points.meet(MAP).fails());
        assert_eq!(plan.failed_at(), Some(MAP));
        assert_eq!(plan.visits(), [(WAKE, 1), (MAP, 1)]);
    }

    #[test]
    fn a_sweep_can_begin_anew_and_be_called_off() {
        let plan = FaultPlan::new(0, Vec::new());
        assert!(fails(&plan, MAP, 3).is_empty());
        plan.fail_nth_from_now(2);
        assert_eq!(fails(&plan, MAP, 5), [2]);
        assert_eq!(plan.failed_at(), Some(MAP));
        plan.fail_nth_from_now(1);
        assert_eq!(plan.failed_at(), None);
        plan.disarm();
        assert!(fails(&plan, MAP, 5).is_empty());
    }

    #[test]
    fn a_closure_runs_at_its_point() {
        let ran = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&ran);
        let action = Action::Run(Arc::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        let plan = FaultPlan::new(0, vec![Rule::always("engine.wake", action)]);
        assert!(!Points::with(&plan).meet(WAKE).fails());
        assert_eq!(ran.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn without_a_plan_nothing_happens() {
        assert_eq!(Points::OFF.meet(MAP), Verdict::Go);
    }
}
