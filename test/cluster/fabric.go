package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// needTools names what is missing, with the package that has it.
func needTools() error {
	var errs []error
	for _, t := range []struct{ cmd, pkg string }{{"ip", "iproute2"}, {"nft", "nftables"}, {"unshare", "util-linux"}, {"nsenter", "util-linux"}} {
		if _, err := exec.LookPath(t.cmd); err != nil {
			errs = append(errs, fmt.Errorf("%s is not installed: apt-get install %s", t.cmd, t.pkg))
		}
	}
	return errors.Join(errs...)
}

func run(ctx context.Context, stdin string, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// batch runs ip commands in a network namespace, in order, until one fails.
func batch(ctx context.Context, ns string, lines ...string) error {
	return run(ctx, strings.Join(lines, "\n")+"\n", "ip", "-n", ns, "-batch", "-")
}

func deleteNetns(ctx context.Context, name string) error {
	if _, err := os.Lstat(netnsPath(name)); err != nil {
		return nil
	}
	return run(ctx, "", "ip", "netns", "del", name)
}

func bridge(seg int) string { return fmt.Sprintf("br%d", seg) }

// makeFabric makes the namespace with a bridge per segment, which is also the router.
func (c *Cluster) makeFabric(ctx context.Context) error {
	s := &c.st
	if err := run(ctx, "", "ip", "netns", "add", s.fabric()); err != nil {
		return err
	}
	lines := []string{"link set lo up"}
	for seg := 1; seg <= s.Segments; seg++ {
		lines = append(lines,
			fmt.Sprintf("link add %s type bridge forward_delay 0 stp_state 0 mcast_snooping 0", bridge(seg)),
			fmt.Sprintf("addr add %s/24 dev %s", s.router(seg), bridge(seg)),
			fmt.Sprintf("link set %s up", bridge(seg)))
	}
	if err := batch(ctx, s.fabric(), lines...); err != nil {
		return err
	}
	if err := run(ctx, "", "nsenter", "--net="+netnsPath(s.fabric()), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"); err != nil {
		return err
	}
	if !s.HostLink {
		return nil
	}
	if err := batch(ctx, s.fabric(), fmt.Sprintf("link add host type veth peer name %s netns %d", s.hostLink(), os.Getpid()),
		"link set host master br1 up"); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"ip", "addr", "add", s.hostAddr().String() + "/24", "dev", s.hostLink()},
		{"ip", "link", "set", s.hostLink(), "up"},
	} {
		if err := run(ctx, "", args...); err != nil {
			return err
		}
	}
	return nil
}

// plug makes a node's network namespace with its link. The address of the network card stays the same for the node's life.
func (c *Cluster) plug(ctx context.Context, n *nodeState) error {
	s := &c.st
	if err := deleteNetns(ctx, s.netns(n)); err != nil {
		return err
	}
	if err := run(ctx, "", "ip", "netns", "add", s.netns(n)); err != nil {
		return err
	}
	_ = batch(ctx, s.fabric(), "link del "+s.port(n)) // of an earlier boot, if the kernel has not removed it yet
	mac := fmt.Sprintf("02:5e:00:00:%02x:%02x", n.Segment, n.Index)
	err := batch(ctx, s.fabric(),
		fmt.Sprintf("link add %s type veth peer name eth0 address %s netns %s", s.port(n), mac, s.netns(n)),
		fmt.Sprintf("link set %s master %s %s", s.port(n), bridge(n.Segment), upDown(!n.LinkDown)))
	if err != nil {
		return err
	}
	return batch(ctx, s.netns(n), "link set lo up", fmt.Sprintf("addr add %s/24 dev eth0", n.IP), "link set eth0 up",
		fmt.Sprintf("route add default via %s", s.router(n.Segment)))
}

func upDown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

// nftRules drops, for each pair, what a bridge passes between their ports, and what the router passes between their addresses. Pure.
func (s *state) nftRules() string {
	var b strings.Builder
	for _, fam := range []string{"bridge", "ip"} {
		// Made and deleted first, so that the whole replaces what is there in one transaction.
		fmt.Fprintf(&b, "table %s lab\ndelete table %s lab\ntable %s lab {\n chain cuts {\n  type filter hook forward priority 0;\n", fam, fam, fam)
		directed := slices.Clone(s.Mutes)
		for _, p := range s.Cuts {
			directed = append(directed, p, [2]string{p[1], p[0]})
		}
		for _, p := range directed {
			x, y := s.node(p[0]), s.node(p[1])
			switch {
			case x == nil || y == nil:
			case fam == "bridge":
				fmt.Fprintf(&b, "  iifname %q oifname %q drop\n", s.port(x), s.port(y))
			default:
				fmt.Fprintf(&b, "  ip saddr %s ip daddr %s drop\n", x.IP, y.IP)
			}
		}
		b.WriteString(" }\n}\n")
	}
	return b.String()
}

func (c *Cluster) applyCuts(ctx context.Context) error {
	return run(ctx, c.st.nftRules(), "nsenter", "--net="+netnsPath(c.st.fabric()), "nft", "-f", "-")
}
