use super::*;
use crate::hca::config::{HcaConfig, PathMtu};
use crate::hca::key::Access;
use crate::hca::qp::attributes::{ModifyQpError, QpAttributes, QpChange};
use crate::hca::request::AddressVector;
use crate::hca::time::AckTimeout;
use crate::wire::{Gid, Psn, QKey, Qpn, RnrTimer};
use QpState::{Error, Init, ReadyToReceive, ReadyToSend, Reset, SendQueueDrain, SendQueueError};

/// The arrows of figure 124, written down once more; those to reset and to error are everybody's.
fn arrows(transport: Transport) -> Vec<(QpState, QpState)> {
    let mut arrows = vec![
        (Reset, Init),
        (Init, Init),
        (Init, ReadyToReceive),
        (ReadyToReceive, ReadyToSend),
        (ReadyToSend, ReadyToSend),
        (ReadyToSend, SendQueueDrain),
        (SendQueueDrain, SendQueueDrain),
        (SendQueueDrain, ReadyToSend),
    ];
    if matches!(transport, Transport::UnreliableConnection | Transport::UnreliableDatagram) {
        arrows.push((SendQueueError, ReadyToSend));
    }
    arrows.extend(QpState::ALL.into_iter().flat_map(|from| [(from, Reset), (from, Error)]));
    arrows
}

/// A change that tells `told`, with values that are in range.
fn telling(to: QpState, told: Attribute) -> QpChange {
    let has = |attribute| told.contains(attribute);
    let config = HcaConfig::default();
    QpChange {
        state: Some(to),
        current_state: None,
        notify_drained: has(Attribute::NOTIFY_DRAINED).then_some(true),
        access: has(Attribute::ACCESS).then_some(Access::REMOTE_READ),
        pkey_index: has(Attribute::PKEY_INDEX).then_some(0),
        port: has(Attribute::PORT).then_some(1),
        qkey: has(Attribute::QKEY).then_some(QKey(7)),
        path: has(Attribute::PATH).then_some(AddressVector::to(Gid(5))),
        path_mtu: has(Attribute::PATH_MTU).then_some(PathMtu::MIN),
        timeout: has(Attribute::TIMEOUT).then_some(AckTimeout::from_code(3).expect("five bits")),
        retry_count: has(Attribute::RETRY_COUNT).then_some(2),
        rnr_retry: has(Attribute::RNR_RETRY).then_some(3),
        rq_psn: has(Attribute::RQ_PSN).then_some(Psn::new(9)),
        reads: has(Attribute::READS).then_some(1),
        min_rnr_timer: has(Attribute::MIN_RNR_TIMER).then_some(RnrTimer::SHORTEST),
        sq_psn: has(Attribute::SQ_PSN).then_some(Psn::new(8)),
        dest_reads: has(Attribute::DEST_READS).then_some(config.most_reads()),
        dest_qpn: has(Attribute::DEST_QPN).then_some(Qpn(4)),
    }
}

fn set_to(state: QpState) -> QpAttributes {
    QpAttributes { state, ..QpAttributes::new(Access::empty(), &HcaConfig::default()) }
}

/// Every attribute but the state itself, which each change names, and the expected one, which is tested by itself.
fn tellable() -> impl Iterator<Item = Attribute> {
    (Attribute::all() - Attribute::STATE - Attribute::CURRENT_STATE).iter()
}

#[test]
fn exactly_the_arrows_of_the_specification_are_ways() {
    for transport in Transport::ALL {
        let arrows = arrows(transport);
        for from in QpState::ALL {
            for to in QpState::ALL {
                let way = demands(transport, from, to).is_some();
                assert_eq!(way, arrows.contains(&(from, to)), "{transport:?}: {from:?} to {to:?}");
            }
        }
    }
}

#[test]
fn each_way_takes_what_it_needs_and_refuses_by_name_what_is_missing_or_too_much() {
    let config = HcaConfig::default();
    let mut checked = 0;
    for transport in Transport::ALL {
        for (from, to) in QpState::ALL.into_iter().flat_map(|from| QpState::ALL.map(|to| (from, to))) {
            let before = set_to(from);
            let after = |told| before.after(&telling(to, told), transport, &config);
            let Some(Demands { required, optional }) = demands(transport, from, to) else {
                let illegal = ModifyQpError::IllegalTransition { from, to, transport };
                assert_eq!(after(Attribute::empty()), Err(illegal));
                continue;
            };
            assert!((required & optional).is_empty(), "{transport:?} {from:?} {to:?}");
            assert_eq!(after(required).expect("all that is needed").state, to);
            for attribute in tellable() {
                checked += 1;
                let result = if required.contains(attribute) {
                    after(required - attribute)
                } else {
                    after(required | attribute)
                };
                let wanted = if required.contains(attribute) {
                    Some(ModifyQpError::Missing { from, to, transport, missing: attribute })
                } else if optional.contains(attribute) {
                    None
                } else {
                    Some(ModifyQpError::NotAllowed { from, to, transport, refused: attribute })
                };
                assert_eq!(result.err(), wanted, "{transport:?} {from:?} to {to:?}: {attribute:?}");
            }
        }
    }
    assert!(checked > 1000, "{checked} combinations");
}

#[test]
fn what_was_told_is_what_it_is_set_to_and_nothing_else_changes() {
    let config = HcaConfig::default();
    let told = SEND_RELIABLE;
    let change = telling(ReadyToSend, told);
    let before = set_to(ReadyToReceive);
    let after = before.after(&change, RC, &config).expect("a way");
    let told = (after.timeout, after.retry_count, after.rnr_retry, after.sq_psn, after.reads);
    let timeout = AckTimeout::from_code(3).expect("five bits");
    assert_eq!(told, (timeout, 2, 3, Psn::new(8), 1));
    assert_eq!((after.rq_psn, after.access, after.path), (before.rq_psn, before.access, before.path));
}

#[test]
fn values_that_no_device_can_be_set_to_are_refused_with_their_range() {
    // A device whose link carries no more than the least.
    let config = HcaConfig { path_mtu: PathMtu::MIN, ..HcaConfig::default() };
    let refused = |from, transport, change: QpChange| match set_to(from).after(&change, transport, &config) {
        Err(ModifyQpError::OutOfRange { attribute, value, .. }) => (attribute, value),
        other => panic!("{other:?}"),
    };
    let open = telling(Init, OPEN);
    assert_eq!(refused(Reset, RC, QpChange { port: Some(2), ..open }), (Attribute::PORT, 2));
    assert_eq!(refused(Reset, RC, QpChange { pkey_index: Some(9), ..open }), (Attribute::PKEY_INDEX, 9));
    let peer = telling(ReadyToReceive, PEER_RELIABLE);
    let far = QpChange { dest_qpn: Some(Qpn(1 << 24)), ..peer };
    assert_eq!(refused(Init, RC, far), (Attribute::DEST_QPN, 1 << 24));
    let large = QpChange { path_mtu: Some(PathMtu::MAX), ..peer };
    assert_eq!(refused(Init, RC, large), (Attribute::PATH_MTU, PathMtu::MAX.bytes()));
    let deep = QpChange { dest_reads: Some(17), ..peer };
    assert_eq!(refused(Init, RC, deep), (Attribute::DEST_READS, 17));
    let send = telling(ReadyToSend, SEND_RELIABLE);
    let patient = QpChange { retry_count: Some(8), ..send };
    assert_eq!(refused(ReadyToReceive, RC, patient), (Attribute::RETRY_COUNT, 8));
    let patient = QpChange { rnr_retry: Some(8), ..send };
    assert_eq!(refused(ReadyToReceive, RC, patient), (Attribute::RNR_RETRY, 8));
    let many = QpChange { reads: Some(17), ..send };
    assert_eq!(refused(ReadyToReceive, RC, many), (Attribute::READS, 17));
}

#[test]
fn a_caller_that_takes_the_state_for_another_is_told() {
    let change = QpChange { current_state: Some(ReadyToSend), ..QpChange::to(SendQueueDrain) };
    let config = HcaConfig::default();
    let wrong = set_to(Init).after(&change, RC, &config);
    assert_eq!(wrong, Err(ModifyQpError::OtherState { from: Init }));
}
