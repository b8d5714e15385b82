//! Whose an entry is. [`Owners::owner`] is the only place that says so; everybody asks it. Pure.
//!
//! Ownership lives in the kernel, not in files. Routes and rules carry our protocol number; rules of iptables have a form
//! that we write (`forms`) and name their uplink by its chain or by a comment. Which uplink a route or
//! rule belongs to is told by the configuration, and where that does not name its table, mark or address, by the entries
//! themselves: an uplink's chain sets a mark, a rule sends the mark to a table, a route in the table names an interface.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::Ipv4Network;

use crate::config::{Config, Uplink};
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::link::Links;
use crate::kernel::observe::Kernel;
use crate::model::names::{IfName, PREFIX, UplinkName};
use crate::model::netfilter::{Rule, Rules, Table};
use crate::model::route::{FwMark, Route, RouteRule, RuleAction, TableId};
use crate::model::state::{Entry, State};
use crate::reconcile::forms::{Form, form, has_our_forms};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Ours, made for these: several where uplinks have the same address, none where nothing tells.
    Ours(Claimants),
    /// Somebody else's, never touched.
    Foreign,
}

impl Owner {
    /// The owner of what names an uplink, or none.
    fn named(uplink: Option<UplinkName>) -> Self {
        uplink.map_or(Self::Foreign, |name| {
            Self::Ours([Claimant::Uplink(name)].into())
        })
    }
}

/// Those that an entry was made for.
pub type Claimants = BTreeSet<Claimant>;

/// Whom an entry was made for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claimant {
    Uplink(UplinkName),
    /// An uplink whose name nothing tells any more; this was its interface.
    Link(String),
}

impl Claimant {
    /// The uplink, where its name is known.
    pub fn uplink(&self) -> Option<&UplinkName> {
        match self {
            Self::Uplink(name) => Some(name),
            Self::Link(_) => None,
        }
    }
}

fn claim<K: Ord>(claims: &mut BTreeMap<K, Claimants>, key: K, claimant: &Claimant) {
    claims.entry(key).or_default().insert(claimant.clone());
}

/// What tells whose an entry is.
#[derive(Debug, Default)]
pub struct Owners {
    configured: BTreeSet<UplinkName>,
    /// The uplinks that our rules and chains name.
    named: BTreeSet<UplinkName>,
    /// Our chains, by table and name.
    chains: BTreeMap<(Table, String), UplinkName>,
    /// The uplinks at an interface, by the entries that name it.
    interfaces: BTreeMap<String, Claimants>,
    /// Interfaces that the configuration gives to uplinks with marks.
    configured_interfaces: BTreeMap<String, Claimants>,
    /// Interfaces whose marked packets a rule sends to the main table.
    marked_links: BTreeSet<String>,
    marks: BTreeMap<FwMark, Claimants>,
    tables: BTreeMap<TableId, Claimant>,
    /// Addresses of links, and pinned sources.
    sources: BTreeMap<Ipv4Network, Claimants>,
}

impl Owners {
    /// Reads what the kernel's entries and the configuration, where there is one, tell.
    pub fn new(config: Option<&Config>, kernel: &Kernel) -> Self {
        let mut owners = Self::default();
        let uplinks = || config.iter().flat_map(|config| &config.uplinks);
        owners.configured = uplinks().map(|(name, _)| name.clone()).collect();
        owners.read_ruleset(&kernel.ruleset);
        for (name, uplink) in uplinks() {
            owners.read_uplink(name, uplink);
        }
        let mut marks: BTreeMap<FwMark, Claimants> = BTreeMap::new();
        let mangle = owners
            .chains
            .iter()
            .filter(|((table, _), _)| *table == Table::Mangle);
        for ((table, chain), uplink) in mangle {
            let chain = kernel.ruleset.chain(table.name(), chain);
            let rules = chain.into_iter().flat_map(|chain| chain.rules.iter());
            for mark in rules.filter_map(sets_mark) {
                claim(&mut marks, mark, &Claimant::Uplink(uplink.clone()));
            }
        }
        for (mark, claimants) in &marks {
            let known = owners.marks.entry(*mark);
            known.or_insert_with(|| claimants.clone());
        }
        let rules = || kernel.routing.rules.iter().filter(|rule| rule.is_ours());
        owners.read_marked_links(rules());
        owners.read_tables(rules(), &kernel.routing.routes, &marks);
        owners.read_sources(rules(), &kernel.routing.routes, &kernel.links);
        owners
    }

    fn read_uplink(&mut self, name: &UplinkName, uplink: &Uplink) {
        let Some(routing) = &uplink.routing else {
            return;
        };
        let claimant = Claimant::Uplink(name.clone());
        self.tables.insert(routing.table, claimant.clone());
        self.marks.insert(routing.mark, [claimant.clone()].into());
        for pin in &uplink.pin {
            claim(&mut self.sources, *pin, &claimant);
        }
        if let Some(interface) = &uplink.identity.interface {
            let interfaces = &mut self.configured_interfaces;
            claim(interfaces, interface.to_string(), &claimant);
        }
    }

    /// Our chains, and the interfaces that our rules name.
    fn read_ruleset(&mut self, ruleset: &Ruleset) {
        let mut candidates = Vec::new();
        for table in Table::ALL {
            let chains = ruleset.tables.get(table.name());
            for (name, chain) in chains.into_iter().flatten() {
                if let Some(uplink) = UplinkName::of_chain(name)
                    && table != Table::Filter
                {
                    let is_configured = self.configured.contains(&uplink);
                    if is_configured || has_our_forms(table, &chain.rules) {
                        if !chain.rules.is_empty() {
                            self.named.insert(uplink.clone());
                        }
                        candidates.push(((table, name.clone()), uplink));
                    }
                    continue;
                }
                let forms = chain
                    .rules
                    .iter()
                    .filter_map(|rule| form(table, name, rule));
                for Form { uplink, interface } in forms {
                    self.named.insert(uplink.clone());
                    if let Some(interface) = interface {
                        claim(&mut self.interfaces, interface, &Claimant::Uplink(uplink));
                    }
                }
            }
        }
        // An empty chain is ours only if something else names its uplink: a name alone makes nothing ours.
        let known = [&self.configured, &self.named];
        candidates.retain(|(_, uplink)| known.iter().any(|names| names.contains(uplink)));
        self.chains = candidates.into_iter().collect();
        // A jump of our form to a chain with rules that we do not write is somebody else's.
        let is_foreign = |uplink: &UplinkName| {
            let chain = uplink.chain();
            let is_there = |table: &Table| ruleset.chain(table.name(), &chain).is_some();
            let mut there = [Table::Mangle, Table::Nat].into_iter().filter(is_there);
            there.any(|table| !self.chains.contains_key(&(table, chain.clone())))
        };
        self.interfaces.retain(|_, claimants| {
            claimants.retain(|claimant| !claimant.uplink().is_some_and(is_foreign));
            !claimants.is_empty()
        });
    }

    /// `iif ppp0 fwmark 0xa/0xff lookup main` tells whose a mark is that neither a chain nor the configuration names.
    fn read_marked_links<'a>(&mut self, rules: impl Iterator<Item = &'a RouteRule>) {
        let mut by_link: BTreeMap<FwMark, Claimants> = BTreeMap::new();
        for rule in rules.filter(|rule| rule.table() == Some(TableId::MAIN)) {
            if let (Some(iif), Some(mark)) = (&rule.iif, rule.fwmark) {
                self.marked_links.insert(iif.clone());
                by_link.entry(mark).or_default().extend(self.at(iif));
            }
        }
        for (mark, claimants) in by_link {
            self.marks.entry(mark).or_insert(claimants);
        }
    }

    /// A table that is not configured is that of the uplink whose chain sets the mark that a rule sends there, whoever has
    /// the mark in the configuration by now.
    fn read_tables<'a>(
        &mut self,
        rules: impl Iterator<Item = &'a RouteRule>,
        routes: &[Route],
        chain_marks: &BTreeMap<FwMark, Claimants>,
    ) {
        for rule in rules {
            let claimants = rule
                .fwmark
                .and_then(|mark| chain_marks.get(&mark).or(self.marks.get(&mark)));
            if let Some(claimant) = claimants.and_then(BTreeSet::first)
                && let Some(table) = rule.table().filter(|table| !table.is_systems())
            {
                self.tables.entry(table).or_insert(claimant.clone());
            }
        }
        for route in routes.iter().filter(|route| route.is_ours()) {
            if let Some(dev) = &route.dev
                && !route.table.is_systems()
                && let Some(claimant) = self.at(dev).first()
            {
                self.tables.entry(route.table).or_insert(claimant.clone());
            }
        }
    }

    fn read_sources<'a>(
        &mut self,
        rules: impl Iterator<Item = &'a RouteRule> + Clone,
        routes: &[Route],
        links: &Links,
    ) {
        for rule in rules.clone() {
            let claimant = rule.table().and_then(|table| self.tables.get(&table));
            if let (Some(from), Some(claimant)) = (rule.from, claimant) {
                claim(&mut self.sources, from, claimant);
            }
        }
        // An uplink that is not known by its interface may be at one by its route, or by the rule that names the link.
        let by_route = routes.iter().filter(|route| route.is_ours());
        let by_route = by_route.map(|route| (&route.dev, self.tables.get(&route.table)));
        let by_rule = rules.map(|rule| {
            let claimants = rule.fwmark.and_then(|mark| self.marks.get(&mark));
            (&rule.iif, claimants.and_then(BTreeSet::first))
        });
        let mut at: BTreeMap<String, Claimants> = BTreeMap::new();
        for (interface, claimant) in by_route.chain(by_rule) {
            if let (Some(interface), Some(claimant)) = (interface, claimant) {
                claim(&mut at, interface.clone(), claimant);
            }
        }
        // Only an uplink with a table has rules for its address.
        let routed: BTreeSet<&Claimant> = self.tables.values().collect();
        for (interface, link) in links {
            let mut claimants = self.uplinks_at(interface);
            claimants.extend(at.remove(interface).unwrap_or_default());
            claimants.retain(|claimant| routed.contains(claimant));
            for address in link.addresses.iter().filter(|_| !claimants.is_empty()) {
                let known = self.sources.entry((*address).into()).or_default();
                known.extend(claimants.iter().cloned());
            }
        }
    }

    pub fn owner(&self, entry: Entry) -> Owner {
        // All fields are named: when one is added, or a kind of entry, the compiler asks here whose the entry is.
        match entry {
            Entry::Route(route) => {
                let Route {
                    table,
                    dev,
                    protocol: _,
                    metric: _,
                    kind: _,
                    destination: _,
                    gateway: _,
                    rest: _,
                } = route;
                if !route.is_ours() {
                    return Owner::Foreign;
                }
                let by_table = self.tables.get(table).map(|claimant| [claimant.clone()]);
                let by_dev = || dev.as_ref().map(|dev| self.at(dev)).unwrap_or_default();
                Owner::Ours(by_table.map_or_else(by_dev, Claimants::from))
            }
            Entry::RouteRule(rule) => {
                let RouteRule {
                    from,
                    iif,
                    fwmark,
                    action,
                    protocol: _,
                    priority: _,
                    to: _,
                    suppress_prefixlength: _,
                    rest: _,
                } = rule;
                if !rule.is_ours() {
                    return Owner::Foreign;
                }
                let by_table = match action {
                    RuleAction::Lookup(table) => self.tables.get(table),
                    RuleAction::Blackhole
                    | RuleAction::Unreachable
                    | RuleAction::Prohibit
                    | RuleAction::Other(_) => None,
                };
                if let Some(claimant) = by_table {
                    return Owner::Ours([claimant.clone()].into());
                }
                // A mark is one uplink's; an interface can be that of several, one after the other.
                let by_mark = fwmark.and_then(|mark| self.marks.get(&mark));
                let by_source = from.and_then(|from| self.sources.get(&from));
                let by_iif = || iif.iter().flat_map(|iif| self.uplinks_at(iif)).collect();
                Owner::Ours(by_mark.or(by_source).cloned().unwrap_or_else(by_iif))
            }
            Entry::Chain(table, chain) => Owner::named(self.chain(table, chain).cloned()),
            Entry::Rule(table, chain, rule) => {
                let own = self.chain(table, chain).cloned();
                Owner::named(own.or_else(|| self.by_rule(table, chain, rule)))
            }
            Entry::SrcValidMark(interface) => self.of_parameter(interface.as_str()),
        }
    }

    /// Only uplinks that mark packets set it; on other links it is somebody else's.
    fn of_parameter(&self, interface: &str) -> Owner {
        let marks = |name: &UplinkName| self.chain(Table::Mangle, &name.chain()).is_some();
        let mut claimants = self.interfaces.get(interface).cloned().unwrap_or_default();
        claimants.retain(|claimant| claimant.uplink().is_some_and(marks));
        if !claimants.is_empty() {
            return Owner::Ours(claimants);
        }
        match self.configured_interfaces.get(interface) {
            Some(claimants) => Owner::Ours(claimants.clone()),
            None if self.marked_links.contains(interface) => {
                Owner::Ours([Claimant::Link(interface.to_owned())].into())
            }
            None => Owner::Foreign,
        }
    }

    /// The uplink of one of our chains.
    fn chain(&self, table: Table, chain: &str) -> Option<&UplinkName> {
        self.chains.get(&(table, chain.to_owned()))
    }

    /// The uplink of a rule in a chain that is not ours. A chain can't be deleted while a rule jumps to it, so a rule that
    /// jumps to ours is removed with it.
    fn by_rule(&self, table: Table, chain: &str, rule: &Rule) -> Option<UplinkName> {
        if !rule.0.contains(PREFIX) {
            return None;
        }
        let words = rule.words();
        let pairs = words.windows(2);
        let mut jumps = pairs.filter(|it| it[0] == "-j" || it[0] == "-g");
        let jump = jumps.find_map(|it| self.chain(table, &it[1]));
        let has_comment = || words.iter().any(|word| word == "--comment");
        let by_form = || form(table, chain, rule).filter(|_| has_comment());
        jump.cloned().or_else(|| Some(by_form()?.uplink))
    }

    /// Those whom an interface's routes and rules were made for.
    fn at(&self, interface: &str) -> Claimants {
        let uplinks = self.interfaces.get(interface).cloned();
        uplinks.unwrap_or_else(|| [Claimant::Link(interface.to_owned())].into())
    }

    /// The uplinks at an interface: those whose entries name it, and those that the configuration gives it to.
    fn uplinks_at(&self, interface: &str) -> Claimants {
        let both = [&self.interfaces, &self.configured_interfaces];
        let claimants = both.iter().filter_map(|it| it.get(interface));
        claimants.flatten().cloned().collect()
    }

    /// The uplinks that have entries and are configured no longer.
    pub fn unconfigured(&self) -> impl Iterator<Item = &UplinkName> {
        self.named.difference(&self.configured)
    }

    /// The uplinks whose entries name this interface.
    pub fn bound_to(&self, interface: &IfName) -> BTreeSet<UplinkName> {
        let claimants = self
            .interfaces
            .get(interface.as_str())
            .into_iter()
            .flatten();
        claimants.filter_map(Claimant::uplink).cloned().collect()
    }

    /// The interface that an uplink's entries name, or the route in its table.
    pub fn interface_of(&self, name: &UplinkName, installed: &State) -> Option<IfName> {
        let claimant = Claimant::Uplink(name.clone());
        let interfaces = self.interfaces.iter();
        let by_entries = interfaces.filter(|(_, claimants)| claimants.contains(&claimant));
        let routes = installed.routes.iter();
        let by_table = routes.filter(|it| self.tables.get(&it.table) == Some(&claimant));
        let names = by_entries.map(|(interface, _)| interface);
        let mut names = names.chain(by_table.filter_map(|route| route.dev.as_ref()));
        names.find_map(|name| IfName::parse(name).ok())
    }

    pub fn installed(&self, kernel: &Kernel) -> State {
        let is_ours = |entry: Entry| self.owner(entry) != Owner::Foreign;
        let routes = kernel.routing.routes.iter();
        let rules = kernel.routing.rules.iter();
        let marked = kernel.links.iter().filter(|(_, link)| link.src_valid_mark);
        let marked = marked.filter_map(|(name, _)| IfName::parse(name).ok());
        let mut state = State {
            routes: routes
                .filter(|it| is_ours(Entry::Route(it)))
                .cloned()
                .collect(),
            rules: rules
                .filter(|it| is_ours(Entry::RouteRule(it)))
                .cloned()
                .collect(),
            src_valid_mark: marked
                .filter(|it| is_ours(Entry::SrcValidMark(it)))
                .collect(),
            tables: BTreeMap::new(),
        };
        self.add_tables(&kernel.ruleset, &mut state);
        state
    }

    fn add_tables(&self, ruleset: &Ruleset, state: &mut State) {
        for table in Table::ALL {
            let chains = ruleset.tables.get(table.name());
            for (name, chain) in chains.into_iter().flatten() {
                if let Some(uplink) = self.chain(table, name) {
                    state.add_chain(table, uplink, name, Rules::clone(&chain.rules));
                    continue;
                }
                for rule in chain.rules.iter() {
                    // iptables-restore takes each line of a comment for a rule: it could not remove this one.
                    if !rule.0.contains('\n')
                        && let Owner::Ours(claimants) = self.owner(Entry::Rule(table, name, rule))
                        && let Some(uplink) = claimants.first().and_then(Claimant::uplink)
                    {
                        state.add_rule(table, uplink, name, rule.clone());
                    }
                }
            }
        }
    }

    /// What of the installed entries a request leaves alone.
    pub fn left_alone(&self, installed: &State, scope: &Scope) -> State {
        installed.filter(|entry| match self.owner(entry) {
            Owner::Ours(claimants) => !scope.has(&claimants),
            Owner::Foreign => true,
        })
    }
}

/// Whose entries a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everybody's who is ours, orphans included.
    All,
    /// Those of these. What was made for others, too, is left alone, and so is what nothing tells whose it is.
    These(Claimants),
}

impl Scope {
    fn has(&self, claimants: &Claimants) -> bool {
        match self {
            Self::All => true,
            Self::These(these) => !claimants.is_empty() && claimants.is_subset(these),
        }
    }
}

/// The mark that a rule of ours gives to connections.
pub fn sets_mark(rule: &Rule) -> Option<FwMark> {
    FwMark::parse(rule.value("--set-xmark")?)
}
