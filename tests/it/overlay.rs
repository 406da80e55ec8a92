//! A process space in which some pages are said to be something else: in a BAR, encrypted, private to a device.

use hw_model::addr::{VirtRange, page_bytes};
use hw_model::bus::{Bar, HostMemory};
use hw_model::sync::{Arc, Mutex};
use odp::notifier::Notifiers;
use odp::page::{Backing, PageRun};
use odp::space::process::ProcessSpace;
use odp::space::{Access, AddressSpace, FaultError, Rung, Watch, WatchError};

/// Where pages are said to be instead.
#[derive(Clone)]
pub enum Instead {
    /// In this BAR, from its start.
    Peer(Arc<Bar>),
    /// Where they are, but of this kind.
    Kind(Backing),
}

pub struct Overlay {
    inner: Arc<ProcessSpace>,
    over: Mutex<Vec<(VirtRange, Instead)>>,
}

impl Overlay {
    pub fn new(inner: &Arc<ProcessSpace>) -> Arc<Self> {
        Arc::new(Self { inner: Arc::clone(inner), over: Mutex::new(Vec::new()) })
    }

    /// From the next walk on, the pages of `range` are `instead`. Tells nobody: call inside an invalidation.
    pub fn say(&self, range: VirtRange, instead: Instead) {
        self.over.lock().push((range, instead));
    }

    fn rewrite(&self, from: usize, out: &mut Vec<PageRun>) {
        let over = self.over.lock();
        for run in out.split_off(from) {
            for page in 0..run.pages {
                let mut one = PageRun {
                    start: run.start.offset(page_bytes(page)),
                    phys: run.phys.offset(page_bytes(page)),
                    pages: 1,
                    ..run
                };
                let here = one.range();
                for (range, instead) in over.iter().filter(|(range, _)| range.overlaps(here)) {
                    match instead {
                        Instead::Peer(bar) => {
                            one.phys = bar.base().offset(one.start.0 - range.start().0);
                            one.provider = Some(bar.provider());
                            one.backing = Backing::DmabufPeer;
                        }
                        Instead::Kind(backing) => one.backing = *backing,
                    }
                }
                PageRun::push(out, one);
            }
        }
    }
}

impl AddressSpace for Overlay {
    fn memory(&self) -> Arc<dyn HostMemory> {
        self.inner.memory()
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        self.inner.notifiers()
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        self.inner.watch(range)
    }
    fn snapshot(&self, range: VirtRange, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let from = out.len();
        let outcome = self.inner.snapshot(range, out);
        self.rewrite(from, out);
        outcome
    }
    fn fault(&self, range: VirtRange, access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let from = out.len();
        let outcome = self.inner.fault(range, access, out);
        self.rewrite(from, out);
        outcome
    }
    fn rung(&self, range: VirtRange) -> Rung {
        self.inner.rung(range)
    }
}
