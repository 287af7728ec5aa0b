// SPDX-License-Identifier: GPL-2.0
// Choice of a back end, shared by the socket hooks and the device hooks.
#ifndef SKEIN_PICK_H
#define SKEIN_PICK_H

#define SEC_NS 1000000000ULL

static __always_inline int member(__u32 set, __be32 ip, __be16 port, __u32 *flags)
{
	struct mb_key k = { .set = set, .ip = ip, .port = port };
	__u32 *f = bpf_map_lookup_elem(&sk_mb, &k);
	if (!f)
		return 0;
	*flags = *f;
	return 1;
}

// pick fills b for the front end k. 1 = chosen, 0 = the front end has no back ends, -1 = no such front end (any more).
// The maps change entry by entry under us: a slot may just have gone, so look again at the count.
static __always_inline int pick(struct fe_key *k, struct fe_val *fe, struct be_val *b)
{
	for (int i = 0; i < 4; i++) {
		struct fe_val *f = bpf_map_lookup_elem(&sk_fe, k);
		if (!f)
			return -1;
		*fe = *f;
		if (!fe->count)
			return 0;
		struct be_key bk = { .set = fe->set, .slot = bpf_get_prandom_u32() % fe->count };
		struct be_val *v = bpf_map_lookup_elem(&sk_be, &bk);
		if (v) {
			*b = *v;
			return 1;
		}
	}
	return 0;
}

// affine overrides b by the client's earlier back end if that is fresh and still a member, and notes the choice.
static __always_inline void affine(struct fe_val *fe, __u64 client, __u32 kind, struct be_val *b)
{
	if (!fe->affinity_s)
		return;
	__u64 now = bpf_ktime_get_coarse_ns();
	struct aff_key k = { .client = client, .set = fe->set, .kind = kind };
	struct aff_val *a = bpf_map_lookup_elem(&sk_aff, &k);
	__u32 flags;
	if (a && now - a->last < (__u64)fe->affinity_s * SEC_NS && member(fe->set, a->ip, a->port, &flags)) {
		b->ip = a->ip;
		b->port = a->port;
		b->flags = flags;
	}
	struct aff_val v = { .last = now, .ip = b->ip, .port = b->port };
	bpf_map_update_elem(&sk_aff, &k, &v, BPF_ANY);
}

#endif
