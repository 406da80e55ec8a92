//! The verbs of the HCA's smaller objects, each with every one of its fallible steps failing in turn; run by `fail_nth`.

use crate::fail_nth::{Made, Stand};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{
    Access, AddressVector, CompletionQueue, CqSpec, KeyChange, KeySpec, Notify, Operation, PageList, Pd,
    QKey, QpChange, QpSpec, RecvRequest, SendRequest, SrqSpec, Status, Transport, WindowBind, WindowKind,
    WindowSpec,
};
use hw_model::sync::Arc;

/// A verb under injection, and its name.
pub type Verb<'a> = (&'static str, Box<dyn FnMut() -> Result<Made, String> + 'a>);

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// All of them, for objects in `pd` that complete to `cq`.
pub fn all<'a>(stand: &'a Stand, pd: Pd, cq: &'a Arc<CompletionQueue>) -> Vec<Verb<'a>> {
    let hca = stand.bed.machine.near.hca();
    let rereg = move || {
        let region = &stand.bed.near.region;
        let change = KeyChange { access: Some(region.access()), ..KeyChange::default() };
        hca.rereg_key(region.key(), change).map_err(words)?;
        Ok(Box::new(()) as Made)
    };
    let ah = move || {
        let handle = hca.create_ah(pd, AddressVector::to(hca.gid())).map_err(words)?;
        Ok(Box::new(handle) as Made)
    };
    let channel = move || {
        let channel = hca.create_channel().map_err(words)?;
        let spec = CqSpec { entries: 1, channel: Some(channel), cookie: 0 };
        let cq = hca.create_cq_with(&spec).map_err(words)?;
        cq.arm(Notify::Any);
        cq.resize(2).map_err(words)?;
        Ok(Box::new(cq) as Made)
    };
    let device_memory = move || {
        let memory = hca.alloc_device_memory(64, 0).map_err(words)?;
        let region = memory.register(pd, Access::LOCAL_WRITE, 0, 64).map_err(words)?;
        Ok(Box::new(region) as Made)
    };
    let null = move || {
        let key = hca.create_null_key(pd).map_err(words)?;
        hca.destroy_null_key(key).expect("it is there");
        Ok(Box::new(()) as Made)
    };
    let shared = move || {
        let srq = hca.create_srq(&SrqSpec { pd, max_requests: 4, max_sges: 1 }).map_err(words)?;
        srq.post(&RecvRequest::new(1, &[])).map_err(words)?;
        let spec = QpSpec { srq: Some(Arc::clone(&srq)), ..QpSpec::new(pd, cq) };
        let qp = hca.create_qp(&spec).map_err(words)?;
        Ok(Box::new((srq, qp)) as Made)
    };
    let extended = move || {
        let domain = hca.open_domain().map_err(words)?;
        let spec = SrqSpec { pd, max_requests: 4, max_sges: 1 };
        let srq = hca.create_extended_srq(&spec, &domain, cq).map_err(words)?;
        let target = hca.create_qp(&QpSpec::target(&domain)).map_err(words)?;
        let opened = domain.open_qp(target.qpn()).map_err(words)?;
        Ok(Box::new((srq, target, opened)) as Made)
    };
    vec![
        ("open_xrcd, create_srq, create_qp and open_qp in it", Box::new(extended)),
        ("create_srq, create_qp over it", Box::new(shared)),
        ("create_qp, modify_qp, post_recv", Box::new(move || sends_to_itself(stand, (pd, cq)))),
        ("create_channel, create_cq, resize_cq", Box::new(channel)),
        ("alloc_dm, reg_dm_mr", Box::new(device_memory)),
        ("alloc_null_mr", Box::new(null)),
        ("rereg_key", Box::new(rereg)),
        ("create_ah", Box::new(ah)),
        ("bind_window, type 1", Box::new(move || binds(stand, (pd, cq), WindowKind::One))),
        ("bind_window, type 2", Box::new(move || binds(stand, (pd, cq), WindowKind::TwoB))),
    ]
}

/// A queue pair is brought up step by step, sends to its own receive, and goes.
fn sends_to_itself(stand: &Stand, (pd, cq): (Pd, &Arc<CompletionQueue>)) -> Result<Made, String> {
    let hca = stand.bed.machine.near.hca();
    let spec = QpSpec { transport: Transport::ReliableConnection, ..QpSpec::new(pd, cq) };
    let qp = hca.create_qp(&spec).map_err(words)?;
    let (transport, config) = (spec.transport, hca.config());
    qp.modify(&QpChange::init(transport, spec.access, QKey(0))).map_err(words)?;
    qp.post_recv(&RecvRequest::new(1, &[])).map_err(words)?;
    // What was posted ends with the queue pair; nobody else is to find it in the queue.
    let mut ended = Vec::new();
    let outcome = (|| {
        qp.modify(&QpChange::ready_to_receive(transport, qp.address(), config)).map_err(words)?;
        qp.modify(&QpChange::ready_to_send(transport, qp.address().psn, config)).map_err(words)?;
        qp.post_send(&SendRequest::send(2, &[])).map_err(words)?;
        while ended.len() < 2 {
            if cq.poll(&mut ended, 2).expect("no overrun") == 0 {
                assert!(cq.wait(stand.patience), "a posted request never ended");
            }
        }
        Ok(())
    })();
    drop(qp);
    while cq.poll(&mut ended, 4).expect("no overrun") > 0 {}
    outcome.map(|()| Box::new(()) as Made)
}

/// A region and a window are made, the window is bound over the region and taken back with it.
fn binds(stand: &Stand, (pd, cq): (Pd, &Arc<CompletionQueue>), kind: WindowKind) -> Result<Made, String> {
    let hca = stand.bed.machine.near.hca();
    let pages = Arc::new(PageList::new(1).expect("one entry"));
    let address = hw_model::addr::RegionAddr(0);
    let access = Access::WINDOW_BIND | Access::LOCAL_WRITE;
    let spec = KeySpec { pd, access, address, length: PAGE_SIZE, first_page_offset: 0, pages };
    let region = hca.create_key(spec).map_err(words)?;
    let on_region = || {
        let key = hca.alloc_window(WindowSpec { pd, kind }).map_err(words)?;
        let bound = on_window(
            stand,
            (pd, cq),
            WindowBind { key, region, address, length: 64, access: Access::REMOTE_READ },
        );
        hca.dealloc_window(key).expect("it is there, bound or not");
        bound
    };
    let outcome = on_region();
    hca.destroy_key(region).expect("no window is bound to it any more");
    outcome
}

fn on_window(stand: &Stand, (pd, cq): (Pd, &Arc<CompletionQueue>), bind: WindowBind) -> Result<Made, String> {
    let hca = stand.bed.machine.near.hca();
    let qp = hca.create_qp(&QpSpec::new(pd, cq)).map_err(words)?;
    qp.connect(qp.address()).map_err(words)?;
    qp.post_send(&SendRequest::new(1, Operation::Bind(bind), &[])).map_err(words)?;
    let mut ended = Vec::new();
    while cq.poll(&mut ended, 1).expect("no overrun") == 0 {
        assert!(cq.wait(stand.patience), "a posted request never ended");
    }
    match ended[0].status {
        Status::Success => Ok(Box::new(()) as Made),
        failed => Err(format!("{failed:?}")),
    }
}
