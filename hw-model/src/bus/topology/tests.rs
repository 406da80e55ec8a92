use super::*;

/// The rule in other words: the bridges from each device up to its root port, and what is on the way.
fn expected(tree: &Topology, provider: PortId, client: PortId) -> PeerRoute {
    let chain = |from: PortId| {
        let mut chain = vec![from];
        while let Some(above) = tree.upstream(*chain.last().expect("not empty")) {
            chain.push(above);
        }
        chain
    };
    let (up, down) = (chain(provider), chain(client));
    let through_host = {
        let ((one, a), (other, b)) = (tree.bridge_of(provider), tree.bridge_of(client));
        let forwards = match (one == other, a, b) {
            (true, Forwarding::None, _) => false,
            (true, ..) => true,
            (false, Forwarding::Any, Forwarding::Any) => true,
            (false, ..) => false,
        };
        if forwards { PeerRoute::HostBridge } else { PeerRoute::NotSupported }
    };
    let Some(common) = up.iter().find(|place| down.contains(place)) else { return through_host };
    let on_the_way = up
        .iter()
        .take_while(|place| *place != common)
        .chain(down.iter().take_while(|place| *place != common))
        .chain([common]);
    if on_the_way.copied().any(|place| tree.redirects(place)) { through_host } else { PeerRoute::BusAddress }
}

/// Two host bridges; below the first, two root ports; below one of them a switch with a device and a second switch.
/// Every setting of every redirecting port and of both bridges, every pair of devices.
#[test]
fn the_route_is_the_kernels_for_every_setting_of_a_tree() {
    let mut seen = std::collections::HashMap::new();
    for setting in 0..1_u32 << 8 {
        let acs = |bit: u32| if setting & 1 << bit != 0 { Acs::Redirect } else { Acs::Off };
        for first in Forwarding::ALL {
            for second in Forwarding::ALL {
                let mut tree = Topology::default();
                let (left, right) = (tree.host_bridge(first), tree.host_bridge(second));
                let mut add = |kind, parent, acs| tree.add(kind, parent, acs).expect("it fits");
                let roots = [
                    add(NodeKind::RootPort, left, acs(0)),
                    add(NodeKind::RootPort, left, acs(1)),
                    add(NodeKind::RootPort, right, acs(2)),
                ];
                let outer = add(NodeKind::Switch, roots[0], acs(3));
                let ports = [
                    add(NodeKind::DownstreamPort, outer, acs(4)),
                    add(NodeKind::DownstreamPort, outer, acs(5)),
                ];
                let inner = add(NodeKind::Switch, ports[1], Acs::Off);
                let inner_ports = [
                    add(NodeKind::DownstreamPort, inner, acs(6)),
                    add(NodeKind::DownstreamPort, inner, acs(7)),
                ];
                let places = [ports[0], inner_ports[0], inner_ports[1], roots[1], roots[2]];
                let devices = places.map(|place| add(NodeKind::Device, place, Acs::Off));
                for provider in devices {
                    for client in devices {
                        let route = tree.route(provider, client);
                        assert_eq!(
                            route,
                            expected(&tree, provider, client),
                            "setting {setting:#x}, bridges {first:?} {second:?}, {provider:?} {client:?}"
                        );
                        *seen.entry(route).or_insert(0_u32) += 1;
                        if provider == client {
                            assert_eq!(route, PeerRoute::BusAddress, "a device reaches itself");
                        }
                    }
                }
            }
        }
    }
    assert_eq!(seen.len(), 3, "every answer was given at least once: {seen:?}");
}

#[test]
fn redirection_above_the_common_switch_does_not_matter() {
    let mut tree = Topology::default();
    let bridge = tree.host_bridge(Forwarding::None);
    let root = tree.add(NodeKind::RootPort, bridge, Acs::Redirect).expect("fits");
    let switch = tree.add(NodeKind::Switch, root, Acs::Off).expect("fits");
    let devices = [0, 1].map(|_| {
        let port = tree.add(NodeKind::DownstreamPort, switch, Acs::Off).expect("fits");
        tree.add(NodeKind::Device, port, Acs::Off).expect("fits")
    });
    assert_eq!(tree.route(devices[0], devices[1]), PeerRoute::BusAddress);
}

#[test]
fn a_tree_takes_only_what_pci_allows() {
    let mut tree = Topology::default();
    let bridge = tree.host_bridge(Forwarding::Any);
    let root = tree.add(NodeKind::RootPort, bridge, Acs::Off).expect("fits");
    let misplaced = |error: TopologyError| matches!(error, TopologyError::Misplaced { .. });
    assert!(misplaced(tree.add(NodeKind::Device, bridge, Acs::Off).unwrap_err()));
    assert!(misplaced(tree.add(NodeKind::DownstreamPort, root, Acs::Off).unwrap_err()));
    let device = tree.add(NodeKind::Device, root, Acs::Off).expect("fits");
    assert!(misplaced(tree.add(NodeKind::Device, device, Acs::Off).unwrap_err()));
    let taken = tree.add(NodeKind::Switch, root, Acs::Off).unwrap_err();
    assert_eq!(taken, TopologyError::Occupied { port: root }, "a link has one end");
    let nowhere = PortId(99);
    assert_eq!(tree.add(NodeKind::RootPort, nowhere, Acs::Off), Err(TopologyError::NoPort { port: nowhere }));
}
