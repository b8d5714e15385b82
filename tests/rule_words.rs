//! A rule's words are the same after they are joined and parsed.

use mh_hook::model::netfilter::{Rule, join};
use proptest::collection::vec;
use proptest::prelude::*;

/// An option and its value, as iptables-save prints them: a name has no spaces, but may have quotes.
fn option() -> impl Strategy<Value = [String; 2]> {
    let name = ("-[iojg]", "[a-z\"\\\\'#é]{1,15}");
    let value = ("--[a-z]{1,9}", any::<String>());
    let both = prop_oneof![name, value];
    both.prop_map(|(option, value)| [option, value])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn words_are_the_same_after_they_are_joined_and_parsed(options in vec(option(), 0..6)) {
        let words = options.concat();
        let rule = Rule::parse(&join(&words)).expect("its quotes are closed");
        prop_assert_eq!(rule.words(), words);
    }
}
