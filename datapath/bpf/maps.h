// SPDX-License-Identifier: GPL-2.0
// Maps and the structures in them. The Go mirror is datapath/service/entries.go and datapath/loader/config.go;
// a changed size or type here gives the pinned maps a new layout by itself, a changed MEANING needs LayoutVersion + 1.
#ifndef SKEIN_MAPS_H
#define SKEIN_MAPS_H

#define FE_EXTERNAL 1 // the front end also answers packets that arrive at a device (NodePort, hostPort, external address)
#define BE_LOCAL 1    // the back end lives on this node

// A front end: one address, port and protocol that clients connect to.
struct fe_key {
	__be32 ip;
	__be16 port;
	__u8 proto;
	__u8 pad;
};
struct fe_val {
	__u32 set;        // the set of back ends
	__u32 count;      // slots 0..count-1 of that set are filled
	__u32 affinity_s; // ClientIP affinity in seconds, 0 = none
	__u32 flags;      // FE_*
};
struct be_key {
	__u32 set;
	__u32 slot;
};
struct be_val {
	__be32 ip;
	__be16 port;
	__u16 flags; // BE_*
};
// Membership: is this address still a back end of the set? Keeps affinity and flows honest.
struct mb_key {
	__u32 set;
	__be32 ip;
	__be16 port;
	__u16 pad;
};
// A socket's view of one address: (cookie, back end) -> front end and, for unconnected UDP, (cookie, front end) -> back end.
struct sock_key {
	__u64 cookie;
	__be32 ip;
	__be16 port;
	__u16 pad;
};
struct sock_val {
	__be32 ip;
	__be16 port;
	__u16 pad;
};
#define AFF_NETNS 0 // the client is a network namespace (its cookie): a pod, or the node itself
#define AFF_ADDR 1  // the client is an address outside
struct aff_key {
	__u64 client;
	__u32 set;
	__u32 kind;
};
struct aff_val {
	__u64 last; // ns, coarse monotonic clock
	__be32 ip;
	__be16 port;
	__u16 pad;
};
// A flow as it looks on the wire, in the direction that the map serves. ICMP echo: the identifier stands for the
// sender's port in a request and for the receiver's in a reply, the other port is 0.
struct ct_key {
	__be32 src;
	__be32 dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};
#define CT_ESTABLISHED 1 // seen more than the opening packet
#define CT_CLOSING 2     // FIN or RST seen in this direction
#define CT_SERVICE 4     // made by a front end: set is valid
struct ct_val {
	__u64 last; // ns, coarse monotonic clock, refreshed about once a second
	__be32 ip;  // the new address; 0 in ct_out = source still to be allocated at the device where the flow leaves
	__be16 port;
	__u16 flags; // CT_*
	__u32 set;
	__be16 alt; // CT_SERVICE: the client's port as the back end sees it, if not its own; and back again. 0 = its own
	__u16 pad;
};
#define DEV_MASQUERADE 1
struct dev_val {
	__be32 snat;     // address that flows leave this device with, 0 = never rewrite
	__be32 pod_net;  // this node's pods
	__be32 pod_mask;
	__u16 l2len;     // 14 on Ethernet, 0 on layer 3 devices
	__u16 flags;     // DEV_*
};
struct lpm_key {
	__u32 bits;
	__be32 ip;
};
struct cfg_val {
	__u64 netns;    // cookie of the node's own network namespace
	__u16 snat_min; // source ports for rewritten flows, host order
	__u16 snat_max;
	__u32 pad;
};
// Fragments after the first carry no ports: (src, dst, id, proto) -> ports of the first.
struct frag_key {
	__be32 src;
	__be32 dst;
	__be16 id;
	__u8 proto;
	__u8 egress;
};
struct frag_val {
	__be16 sport;
	__be16 dport;
};

#define MAP(NAME, TYPE, KEY, VAL, MAX, FLAGS)      \
	struct {                                   \
		__uint(type, TYPE);                \
		__uint(max_entries, MAX);          \
		__uint(map_flags, FLAGS);          \
		__type(key, KEY);                  \
		__type(value, VAL);                \
	} NAME SEC(".maps")

MAP(sk_fe, BPF_MAP_TYPE_HASH, struct fe_key, struct fe_val, 32768, BPF_F_NO_PREALLOC);
MAP(sk_be, BPF_MAP_TYPE_HASH, struct be_key, struct be_val, 131072, BPF_F_NO_PREALLOC);
MAP(sk_mb, BPF_MAP_TYPE_HASH, struct mb_key, __u32, 131072, BPF_F_NO_PREALLOC);
MAP(sk_rev, BPF_MAP_TYPE_LRU_HASH, struct sock_key, struct sock_val, 32768, 0);
MAP(sk_udp, BPF_MAP_TYPE_LRU_HASH, struct sock_key, struct sock_val, 8192, 0);
MAP(sk_aff, BPF_MAP_TYPE_LRU_HASH, struct aff_key, struct aff_val, 8192, 0);
MAP(sk_ct_in, BPF_MAP_TYPE_LRU_HASH, struct ct_key, struct ct_val, 32768, 0);
MAP(sk_ct_out, BPF_MAP_TYPE_LRU_HASH, struct ct_key, struct ct_val, 32768, 0);
MAP(sk_frag, BPF_MAP_TYPE_LRU_HASH, struct frag_key, struct frag_val, 2048, 0);
MAP(sk_dev, BPF_MAP_TYPE_HASH, __u32, struct dev_val, 64, 0);
MAP(sk_keep, BPF_MAP_TYPE_LPM_TRIE, struct lpm_key, __u32, 8192, BPF_F_NO_PREALLOC);
MAP(sk_cfg, BPF_MAP_TYPE_ARRAY, __u32, struct cfg_val, 1, 0);

#endif
