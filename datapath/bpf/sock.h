// SPDX-License-Identifier: GPL-2.0
// Socket-level load balancing: a Service costs one look-up when a client connects, nothing per packet.
#ifndef SKEIN_SOCK_H
#define SKEIN_SOCK_H

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define ECONNREFUSED 111
#define ALLOW 1
#define DENY 0

// forward rewrites *ip:*port when they name a front end.
static __always_inline int forward(struct bpf_sock_addr *c, __be32 *ip, __be16 *port, int send)
{
	struct fe_key k = { .ip = *ip, .port = *port };
	struct fe_val fe;
	struct be_val b;
	if (c->type == SOCK_STREAM)
		k.proto = IPPROTO_TCP;
	else if (c->type == SOCK_DGRAM)
		k.proto = IPPROTO_UDP;
	else
		return ALLOW;
	struct fe_val *f = bpf_map_lookup_elem(&sk_fe, &k);
	if (!f)
		return ALLOW;
	__u64 netns = bpf_get_netns_cookie(c);
	if ((*ip & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000)) {
		// 127.0.0.1 is the node only in the node's own namespace
		__u32 zero = 0;
		struct cfg_val *cfg = bpf_map_lookup_elem(&sk_cfg, &zero);
		if (!cfg || cfg->netns != netns)
			return ALLOW;
	}
	struct sock_key s = { .cookie = bpf_get_socket_cookie(c), .ip = *ip, .port = *port };
	__u32 flags;
	if (send) { // an unconnected UDP socket stays with its back end (QUIC and the like depend on it)
		struct sock_val *u = bpf_map_lookup_elem(&sk_udp, &s);
		if (u && member(f->set, u->ip, u->port, &flags)) {
			*ip = u->ip;
			*port = u->port;
			return ALLOW;
		}
	}
	int r = pick(&k, &fe, &b);
	if (r < 0)
		return ALLOW;
	if (!r) { // what a closed port answers; without it the caller would see EPERM
		bpf_set_retval(-ECONNREFUSED);
		return DENY;
	}
	affine(&fe, netns, AFF_NETNS, &b);
	struct sock_val to = { .ip = b.ip, .port = b.port };
	struct sock_val from = { .ip = *ip, .port = *port };
	if (send)
		bpf_map_update_elem(&sk_udp, &s, &to, BPF_ANY);
	s.ip = b.ip;
	s.port = b.port;
	bpf_map_update_elem(&sk_rev, &s, &from, BPF_ANY);
	*ip = b.ip;
	*port = b.port;
	return ALLOW;
}

// backward shows the front end where the kernel knows the back end.
static __always_inline int backward(struct bpf_sock_addr *c, __be32 *ip, __be16 *port)
{
	struct sock_key s = { .cookie = bpf_get_socket_cookie(c), .ip = *ip, .port = *port };
	struct sock_val *v = bpf_map_lookup_elem(&sk_rev, &s);
	if (!v)
		return 0;
	*ip = v->ip;
	*port = v->port;
	return 1;
}

static __always_inline int forward4(struct bpf_sock_addr *c, int send)
{
	__be32 ip = c->user_ip4;
	__be16 port = (__be16)c->user_port;
	int r = forward(c, &ip, &port, send);
	if (r == ALLOW && (ip != c->user_ip4 || port != (__be16)c->user_port)) {
		c->user_ip4 = ip;
		c->user_port = port;
	}
	return r;
}

static __always_inline int backward4(struct bpf_sock_addr *c)
{
	__be32 ip = c->user_ip4;
	__be16 port = (__be16)c->user_port;
	if (backward(c, &ip, &port)) {
		c->user_ip4 = ip;
		c->user_port = port;
	}
	return ALLOW;
}

// A dual-stack socket reaches IPv4 through ::ffff:a.b.c.d, and the kernel calls the IPv6 hook for it.
static __always_inline int mapped(struct bpf_sock_addr *c)
{
	return !c->user_ip6[0] && !c->user_ip6[1] && c->user_ip6[2] == bpf_htonl(0xffff);
}

static __always_inline int backward6(struct bpf_sock_addr *c)
{
	if (!mapped(c))
		return ALLOW;
	__be32 ip = c->user_ip6[3];
	__be16 port = (__be16)c->user_port;
	if (backward(c, &ip, &port)) {
		c->user_ip6[3] = ip;
		c->user_port = port;
	}
	return ALLOW;
}

SEC("cgroup/connect4") int sk_connect4(struct bpf_sock_addr *c) { return forward4(c, 0); }
SEC("cgroup/sendmsg4") int sk_sendmsg4(struct bpf_sock_addr *c) { return forward4(c, 1); }
SEC("cgroup/recvmsg4") int sk_recvmsg4(struct bpf_sock_addr *c) { return backward4(c); }
SEC("cgroup/getpeername4") int sk_getpeer4(struct bpf_sock_addr *c) { return backward4(c); }
SEC("cgroup/connect6") int sk_connect6(struct bpf_sock_addr *c)
{
	if (!mapped(c))
		return ALLOW;
	__be32 ip = c->user_ip6[3];
	__be16 port = (__be16)c->user_port;
	int r = forward(c, &ip, &port, 0);
	if (r == ALLOW) {
		c->user_ip6[3] = ip;
		c->user_port = port;
	}
	return r;
}
SEC("cgroup/recvmsg6") int sk_recvmsg6(struct bpf_sock_addr *c) { return backward6(c); }
SEC("cgroup/getpeername6") int sk_getpeer6(struct bpf_sock_addr *c) { return backward6(c); }

#endif
