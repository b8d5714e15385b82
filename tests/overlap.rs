//! Which forwards overlap, and which is the first that takes a packet, by the packets that they take.

use std::net::Ipv4Addr;

use mh_hook::model::forward::{Asked, Forward, ForwardIndex, PortRange, Protocol, overlapping};
use proptest::collection::vec;
use proptest::prelude::*;

fn forward() -> impl Strategy<Value = Forward> {
    let ports = (1..30u16, 0..6u16).prop_map(|(first, more)| PortRange {
        first,
        last: first + more,
    });
    let protocols = prop_oneof![
        Just(vec![Protocol::Tcp]),
        Just(vec![Protocol::Udp, Protocol::Tcp]),
        Just(vec![Protocol::Udp]),
        Just(vec![]),
    ];
    let from = vec(
        (1..4u8).prop_map(|host| Ipv4Addr::new(192, 0, 2, host).into()),
        0..2,
    );
    let address = proptest::option::weighted(0.3, (1..3u8).prop_map(own));
    let parts = (
        protocols,
        proptest::option::weighted(0.8, ports),
        from,
        address,
    );
    parts.prop_map(|(protocols, ports, from, address)| Forward {
        protocols: protocols.into(),
        ports,
        address,
        to: Some(Ipv4Addr::new(192, 168, 0, 2)),
        to_port: None,
        from,
    })
}

/// An address of the link.
fn own(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, last)
}

/// Packets of each kind that [`forward`] tells apart.
fn packets() -> impl Iterator<Item = Asked> {
    let sources = (1..4u8).map(|host| Ipv4Addr::new(192, 0, 2, host));
    sources.flat_map(|source| {
        [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .flat_map(move |protocol| {
                let ports = (1..36).flat_map(|port| [(port, 1), (port, 2)]);
                ports.map(move |(port, last)| Asked {
                    source: Some(source),
                    destination: Some(own(last)),
                    protocol: protocol.number(),
                    port: Some(port),
                })
            })
    })
}

/// Some packet fits both, and it is not so that the later one is only more general than the earlier one.
fn overlap(earlier: &Forward, later: &Forward) -> bool {
    let open = |forward: &Forward| {
        let Forward {
            protocols,
            ports,
            from,
            address,
            ..
        } = forward;
        [
            protocols.is_empty(),
            ports.is_none(),
            from.is_empty(),
            address.is_none(),
        ]
    };
    let (above, below) = (open(earlier), open(later));
    let is_ordered = above != below && (0..4).all(|at| above[at] <= below[at]);
    let fits_both = |asked| earlier.takes(asked) && later.takes(asked);
    packets().any(fits_both) && !is_ordered
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_overlap_is_found_with_the_first_above_it(forwards in vec(forward(), 0..30)) {
        let first = |later: usize| {
            (0..later).find(|earlier| overlap(&forwards[*earlier], &forwards[later]))
        };
        let pairs = (0..forwards.len()).filter_map(|later| first(later).map(|it| (later, it)));
        prop_assert_eq!(overlapping(&forwards), pairs.collect());
    }

    #[test]
    fn the_index_finds_the_first_that_takes_a_packet(forwards in vec(forward(), 0..30)) {
        let index = ForwardIndex::new(forwards.clone());
        for asked in packets() {
            let first = forwards.iter().position(|forward| forward.takes(asked));
            prop_assert_eq!(index.place(asked), first);
        }
    }
}
