// SPDX-License-Identifier: GPL-2.0
// Device hooks: NodePort and external addresses for packets from outside, and the masquerade of pods.
//
// Arriving packets only ever get a new destination, leaving ones a new source, as the kernel's own NAT does it: between
// the two the packet is routed with addresses that are not the node's own source, which routing would refuse.
//   sk_ct_in   arriving flow -> new destination: the back end that was chosen, or who a rewritten source stands for
//   sk_ct_out  leaving flow  -> new source: the front end that a reply belongs to (CT_SERVICE), or our address and port
// A client's flow to a back end on another node needs both: its replies must come back through here.
#ifndef SKEIN_NAT_H
#define SKEIN_NAT_H

#define TCX_NEXT -1
#define TCX_DROP 2
#define ETH_P_IP 0x0800
#define IPPROTO_ICMP 1
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
#define TRIES 16

struct ip4 {
	__u8 vihl, tos;
	__be16 len, id, frag;
	__u8 ttl, proto;
	__u16 csum;
	__be32 src, dst;
};

struct pkt {
	struct ct_key k;
	__u32 l3, l4; // offsets
	__u8 tcp;     // flags
	__u8 rest;    // a fragment after the first: addresses only
	__u8 error;   // an ICMP error: about another packet
	__u8 opening; // may start a flow
};

// ports finds what stands for ports at off. 0 = nothing does.
static __always_inline int ports(struct __sk_buff *skb, __u32 off, struct ct_key *k, struct pkt *p)
{
	struct {
		__be16 s, d;
		__u32 a, b;
		__u8 len, flags;
	} __attribute__((packed)) t = {};
	struct {
		__u8 type, code;
		__u16 csum;
		__be16 id, seq;
	} i;
	switch (k->proto) {
	case IPPROTO_TCP: // an ICMP error holds only 8 bytes of it
		if (bpf_skb_load_bytes(skb, off, &t, p ? 14 : 4))
			return 0;
		if (p) {
			p->tcp = t.flags;
			p->opening = (t.flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
		}
		break;
	case IPPROTO_UDP:
		if (bpf_skb_load_bytes(skb, off, &t, 4))
			return 0;
		if (p)
			p->opening = 1;
		break;
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, off, &i, 8))
			return 0;
		if (i.type == 8) { // echo request
			t.s = i.id;
			if (p)
				p->opening = 1;
		} else if (i.type == 0) { // echo reply
			t.d = i.id;
		} else if (p && (i.type == 3 || i.type == 11 || i.type == 12)) { // unreachable, time exceeded, bad parameter
			p->error = 1;
		} else {
			return 0;
		}
		break;
	default:
		return 0;
	}
	k->sport = t.s;
	k->dport = t.d;
	return 1;
}

static __always_inline int parse(struct __sk_buff *skb, __u32 l2, struct pkt *p, __u8 egress)
{
	struct ip4 h;
	if (skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, l2, &h, sizeof(h)))
		return 0;
	p->l3 = l2;
	p->l4 = l2 + (h.vihl & 15) * 4;
	p->k.src = h.src;
	p->k.dst = h.dst;
	p->k.proto = h.proto;
	struct frag_key f = { .src = h.src, .dst = h.dst, .id = h.id, .proto = h.proto, .egress = egress };
	if (h.frag & bpf_htons(0x1fff)) {
		struct frag_val *v = bpf_map_lookup_elem(&sk_frag, &f);
		if (!v)
			return 0;
		p->k.sport = v->sport;
		p->k.dport = v->dport;
		p->rest = 1;
		return 1;
	}
	if (!ports(skb, p->l4, &p->k, p))
		return 0;
	if (h.frag & bpf_htons(0x2000)) {
		struct frag_val v = { .sport = p->k.sport, .dport = p->k.dport };
		bpf_map_update_elem(&sk_frag, &f, &v, BPF_ANY);
	}
	return 1;
}

// alive says whether a flow may still be in use; its entry and its port belong to others when it is not. Between the
// kernel's defaults (nf_conntrack) and the little that the table's size allows; a flow that is used again is simply kept.
static __always_inline int alive(struct ct_val *e, __u8 proto, __u64 now)
{
	__u64 idle = now - e->last;
	if (proto != IPPROTO_TCP)
		return idle < 180 * SEC_NS;
	if (e->flags & CT_CLOSING)
		return idle < 30 * SEC_NS;
	return idle < (e->flags & CT_ESTABLISHED ? 6 * 3600 : 120) * SEC_NS;
}

static __always_inline void touch(struct ct_val *e, struct pkt *p, __u64 now)
{
	__u16 f = e->flags;
	if (p->k.proto == IPPROTO_TCP && !p->rest) {
		if (p->opening)
			f &= ~(CT_CLOSING | CT_ESTABLISHED);
		else if (p->tcp & (TCP_FIN | TCP_RST))
			f |= CT_CLOSING;
		else
			f |= CT_ESTABLISHED;
		if (f != e->flags)
			e->flags = f;
	}
	if (now - e->last > SEC_NS) // not on every packet: the line is shared between processors
		e->last = now;
}

// rewrite gives the packet a new source or destination, with checksums. A half-done packet must not go on.
static __always_inline int rewrite(struct __sk_buff *skb, struct pkt *p, int source, __be32 ip, __be16 port)
{
	__be32 oip = source ? p->k.src : p->k.dst;
	__be16 oport = source ? p->k.sport : p->k.dport;
	__u32 at = p->l4 + (source ? 0 : 2), csum = p->l4 + 16;
	__u64 fl = 0;
	if (!p->rest) {
		if (p->k.proto == IPPROTO_UDP) {
			csum = p->l4 + 6;
			fl = BPF_F_MARK_MANGLED_0; // 0 = the sender did not compute one
		} else if (p->k.proto == IPPROTO_ICMP) {
			csum = p->l4 + 2;
			at = p->l4 + 4;
		}
		if (p->k.proto != IPPROTO_ICMP && bpf_l4_csum_replace(skb, csum, oip, ip, fl | BPF_F_PSEUDO_HDR | 4))
			return TCX_DROP;
		if (port != oport && (bpf_l4_csum_replace(skb, csum, oport, port, fl | 2) || bpf_skb_store_bytes(skb, at, &port, 2, 0)))
			return TCX_DROP;
	}
	if (bpf_l3_csum_replace(skb, p->l3 + 10, oip, ip, 4) || bpf_skb_store_bytes(skb, p->l3 + (source ? 12 : 16), &ip, 4, 0))
		return TCX_DROP;
	return TCX_NEXT;
}

// error rewrites an ICMP error about a packet of a flow that we rewrite, so that path MTU discovery works through it:
// outside, the packet inside looks as it did on the wire there. The inner packet runs the other way.
static __always_inline int error(struct __sk_buff *skb, struct pkt *p, void *table, int egress)
{
	__u32 in3 = p->l4 + 8;
	struct ip4 h;
	if (bpf_skb_load_bytes(skb, in3, &h, sizeof(h)) || (h.frag & bpf_htons(0x1fff)))
		return TCX_NEXT;
	__u32 in4 = in3 + (h.vihl & 15) * 4;
	struct ct_key in = { .src = h.src, .dst = h.dst, .proto = h.proto };
	if (!ports(skb, in4, &in, 0))
		return TCX_NEXT;
	struct ct_key k = { .src = in.dst, .dst = in.src, .sport = in.dport, .dport = in.sport, .proto = in.proto };
	struct ct_val *e = bpf_map_lookup_elem(table, &k);
	if (!e || !e->ip)
		return TCX_NEXT;
	__be32 ip = e->ip, oip = egress ? in.dst : in.src;
	__be16 port = e->port, oport = egress ? in.dport : in.sport;
	__u32 at = in.proto == IPPROTO_ICMP ? in4 + 4 : in4 + (egress ? 2 : 0);
	// The inner header's sum absorbs the inner address, so that the outer one changes with the port only.
	if (port != oport && (bpf_l4_csum_replace(skb, p->l4 + 2, oport, port, 2) || bpf_skb_store_bytes(skb, at, &port, 2, 0)))
		return TCX_DROP;
	if (bpf_l3_csum_replace(skb, in3 + 10, oip, ip, 4) || bpf_skb_store_bytes(skb, in3 + (egress ? 16 : 12), &ip, 4, 0))
		return TCX_DROP;
	p->rest = 1; // outside: the address only
	return rewrite(skb, p, egress, ip, 0);
}

// free_port proposes a source port, network order.
static __always_inline __be16 free_port(struct cfg_val *cfg)
{
	__u32 span = (__u32)cfg->snat_max - cfg->snat_min + 1;
	return bpf_htons((__u16)(cfg->snat_min + bpf_get_prandom_u32() % span));
}

// current: may this packet go on to the back end of e? What opens a flow anew must not go to one that has left.
static __always_inline int current(struct ct_val *e, struct pkt *p)
{
	if (!(e->flags & CT_SERVICE) || !p->opening || p->rest)
		return 1;
	if (e->flags & CT_CLOSING)
		return 0;
	struct fe_key k = { .ip = p->k.dst, .port = p->k.dport, .proto = p->k.proto };
	struct fe_val *f = bpf_map_lookup_elem(&sk_fe, &k);
	__u32 flags;
	return f && f->set == e->set && member(e->set, e->ip, e->port, &flags);
}

// both gives a packet of a service's flow its other end, and the client's port if that had to change.
static __always_inline int both(struct __sk_buff *skb, struct pkt *p, int source, struct ct_val *e)
{
	__be32 ip = e->ip, peer = source ? p->k.dst : p->k.src;
	__be16 port = e->port, alt = e->alt;
	if (alt && !p->rest && rewrite(skb, p, !source, peer, alt) == TCX_DROP)
		return TCX_DROP;
	return rewrite(skb, p, source, ip, port);
}

// open chooses a back end for a new flow to an external front end.
static __always_inline int open(struct __sk_buff *skb, struct pkt *p, __u64 now)
{
	if (!p->opening || p->rest || p->k.proto == IPPROTO_ICMP)
		return TCX_NEXT;
	struct fe_key k = { .ip = p->k.dst, .port = p->k.dport, .proto = p->k.proto };
	struct fe_val *f = bpf_map_lookup_elem(&sk_fe, &k);
	if (!f || !(f->flags & FE_EXTERNAL))
		return TCX_NEXT;
	struct fe_val fe;
	struct be_val b;
	if (pick(&k, &fe, &b) <= 0)
		return TCX_NEXT; // the node's own stack answers as for any closed port
	affine(&fe, p->k.src, AFF_ADDR, &b);
	__u32 zero = 0;
	struct cfg_val *cfg = bpf_map_lookup_elem(&sk_cfg, &zero);
	if (!cfg || cfg->snat_max < cfg->snat_min)
		return TCX_DROP;
	struct ct_key back = { .src = b.ip, .dst = p->k.src, .sport = b.port, .dport = p->k.sport, .proto = p->k.proto };
	struct ct_val v = { .last = now, .ip = p->k.dst, .port = p->k.dport, .flags = CT_SERVICE, .set = fe.set };
	for (int i = 0; i < TRIES; i++) {
		// One client port may reach one back end through two front ends. Replies could not be told apart, so the second
		// flow gets another client port.
		if (i)
			back.dport = free_port(cfg);
		struct ct_val *o = bpf_map_lookup_elem(&sk_ct_out, &back);
		if (o && alive(o, p->k.proto, now) && (i || o->ip != p->k.dst || o->port != p->k.dport || o->alt))
			continue;
		if (i)
			v.alt = p->k.sport;
		bpf_map_update_elem(&sk_ct_out, &back, &v, BPF_ANY);
		if (!(b.flags & BE_LOCAL)) {
			struct ct_key on = { .src = p->k.src, .dst = b.ip, .sport = back.dport, .dport = b.port, .proto = p->k.proto };
			struct ct_val todo = { .last = now };
			bpf_map_update_elem(&sk_ct_out, &on, &todo, BPF_NOEXIST);
		}
		v.ip = b.ip;
		v.port = b.port;
		v.alt = i ? back.dport : 0;
		bpf_map_update_elem(&sk_ct_in, &p->k, &v, BPF_ANY);
		return both(skb, p, 0, &v);
	}
	return TCX_DROP;
}

// snat gives a flow the device's address and a free port, in whose name replies find back. e is the flow's entry or null.
static __always_inline int snat(struct __sk_buff *skb, struct dev_val *d, struct pkt *p, struct ct_val *e, __u64 now)
{
	struct ct_key in = { .src = p->k.dst, .dst = d->snat, .sport = p->k.dport, .proto = p->k.proto };
	struct ct_val back = { .last = now, .ip = p->k.src, .port = p->k.sport };
	struct ct_val *o;
	if (e && e->ip) {
		int look = p->opening || now - e->last > SEC_NS;
		__be32 ip = e->ip;
		__be16 port = e->port;
		touch(e, p, now);
		in.dst = ip;
		in.dport = port;
		// The way back may have been forgotten (least recently used) or given away; look about once a second.
		if (!look || !bpf_map_update_elem(&sk_ct_in, &in, &back, BPF_NOEXIST))
			return rewrite(skb, p, 1, ip, port);
		o = bpf_map_lookup_elem(&sk_ct_in, &in);
		if (o && o->ip == back.ip && o->port == back.port)
			return rewrite(skb, p, 1, ip, port);
		in.dst = d->snat;
	}
	__u32 zero = 0;
	struct cfg_val *cfg = bpf_map_lookup_elem(&sk_cfg, &zero);
	if (!d->snat || !cfg || cfg->snat_max < cfg->snat_min || p->rest)
		return TCX_DROP;
	for (int i = 0; i < TRIES; i++) {
		in.dport = free_port(cfg);
		o = bpf_map_lookup_elem(&sk_ct_in, &in);
		if (o) {
			struct ct_key own = { .src = o->ip, .dst = p->k.dst, .sport = o->port, .dport = p->k.dport, .proto = p->k.proto };
			struct ct_val *q = bpf_map_lookup_elem(&sk_ct_out, &own);
			if (alive(o, p->k.proto, now) || (q && q->port == in.dport && alive(q, p->k.proto, now)))
				continue;
			bpf_map_delete_elem(&sk_ct_out, &own);
			bpf_map_delete_elem(&sk_ct_in, &in);
		}
		if (bpf_map_update_elem(&sk_ct_in, &in, &back, BPF_NOEXIST))
			continue; // another processor was faster
		struct ct_val v = { .last = now, .ip = d->snat, .port = in.dport };
		bpf_map_update_elem(&sk_ct_out, &p->k, &v, BPF_ANY);
		return rewrite(skb, p, 1, d->snat, in.dport);
	}
	return TCX_DROP;
}

SEC("tcx/ingress") int sk_ingress(struct __sk_buff *skb)
{
	__u32 dev = skb->ifindex;
	struct dev_val *d = bpf_map_lookup_elem(&sk_dev, &dev);
	struct pkt p = {};
	if (!d || !parse(skb, d->l2len, &p, 0))
		return TCX_NEXT;
	if (p.error)
		return error(skb, &p, &sk_ct_in, 0);
	__u64 now = bpf_ktime_get_coarse_ns();
	struct ct_val *e = bpf_map_lookup_elem(&sk_ct_in, &p.k);
	if (!e || !current(e, &p))
		return open(skb, &p, now);
	touch(e, &p, now);
	return both(skb, &p, 0, e);
}

SEC("tcx/egress") int sk_egress(struct __sk_buff *skb)
{
	__u32 dev = skb->ifindex;
	struct dev_val *d = bpf_map_lookup_elem(&sk_dev, &dev);
	struct pkt p = {};
	if (!d || !parse(skb, d->l2len, &p, 1))
		return TCX_NEXT;
	if (p.error)
		return error(skb, &p, &sk_ct_out, 1);
	__u64 now = bpf_ktime_get_coarse_ns();
	struct ct_val *e = bpf_map_lookup_elem(&sk_ct_out, &p.k);
	if (e && (e->flags & CT_SERVICE)) {
		touch(e, &p, now);
		return both(skb, &p, 1, e);
	}
	if (!e) {
		if (!(d->flags & DEV_MASQUERADE) || (p.k.src & d->pod_mask) != d->pod_net || !p.opening || p.rest)
			return TCX_NEXT;
		struct lpm_key k = { .bits = 32, .ip = p.k.dst };
		if (bpf_map_lookup_elem(&sk_keep, &k))
			return TCX_NEXT;
	}
	return snat(skb, d, &p, e, now);
}

#endif
