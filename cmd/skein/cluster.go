package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"

	"skein.io/skein/node/client"
	"skein.io/skein/node/daemon"
)

// output is the -o of Skein's own commands.
type output struct {
	Output string `short:"o" help:"Format: table, json or yaml." enum:"table,json,yaml" default:"table"`
}

// encode writes v if the format is one for programs.
func encode(out io.Writer, format string, v any) (written bool, err error) {
	switch format {
	case "json":
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return true, e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err == nil {
			_, err = out.Write(b)
		}
		return true, err
	}
	return false, nil
}

// print writes v as -o asks; the table by the function given.
func (o output) print(v any, table func(w io.Writer)) error {
	if written, err := encode(os.Stdout, o.Output, v); written {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	table(w)
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

type membersCmd struct {
	targetFlag
	output
}

func (m *membersCmd) Run(ctx context.Context) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	ms, err := c.Members(ctx)
	if err != nil {
		return err
	}
	return m.print(ms, func(w io.Writer) {
		fmt.Fprintln(w, "NAME\tADDRESS\tSTATUS\tFOR\tZONE\tROLE\tVERSION\tRTT")
		for _, x := range ms {
			rtt := "-"
			if x.RTTMillis >= 0 && !x.Self {
				rtt = strconv.FormatFloat(x.RTTMillis, 'f', 1, 64) + "ms"
			}
			name := x.Name
			if x.Self {
				name += " (here)"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, x.Address, x.Status, short(x.SinceSeconds), orDash(x.Zone), x.Role, x.Version, rtt)
		}
	})
}

func short(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Truncate(time.Second).String()
}

type statusCmd struct {
	targetFlag
	output
}

func (s *statusCmd) Run(ctx context.Context) error {
	c, err := s.client()
	if err != nil {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	err = s.print(st, func(w io.Writer) {
		fmt.Fprintf(w, "node\t%s\ncluster\t%s\nversion\t%s\nup\t%s\n\n", st.Node, st.Cluster, st.Version, short(st.Uptime))
		fmt.Fprintln(w, "SHARD\tLEADER\tTERM\tAPPLIED\tREVISION\tIN USE\tHERE\tREADY\tVOTERS\tSPARES")
		for _, x := range st.Shards {
			here := []any{"-", "-", "-", "-", "-"} // what only a replica knows
			if x.Role != "none" {
				here = []any{x.Term, x.Applied, x.Revision, fmt.Sprintf("%d/%d kB", x.InUse>>10, x.Size>>10), map[bool]string{true: "yes", false: "no"}[x.Ready]}
			}
			fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%v\t%v\t%s\t%v\t%s\t%s\n", x.Name, orDash(x.Leader), here[0], here[1], here[2], here[3], x.Role, here[4], orDash(strings.Join(x.Voters, ",")), orDash(strings.Join(x.Spares, ",")))
		}
		printPlacement(w, st)
		printBrakes(w, st)
		fmt.Fprintln(w, "\nPART\tHEALTH\tDETAIL")
		for _, p := range st.Parts {
			h := "ok"
			if !p.Healthy {
				h = "FAILING"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, h, p.Message)
		}
	})
	if err != nil {
		return err
	}
	for _, p := range st.Parts {
		if !p.Healthy {
			return exitCode(1)
		}
	}
	return nil
}

// printPlacement says why each node votes or not, what comes next, and what cannot be done.
func printPlacement(w io.Writer, st client.Status) {
	if st.Placement == nil {
		if st.PlacementError != "" {
			fmt.Fprintf(w, "\nwhy nodes vote or not is not known: %s\n", st.PlacementError)
		}
		return
	}
	fmt.Fprintln(w, "\nNODE\tZONE\tVOTES?")
	for _, n := range st.Placement.Nodes {
		fmt.Fprintf(w, "%s\t%s\t%s\n", n.Node, orDash(n.Zone), n.Why)
	}
	for _, p := range st.Placement.Shards {
		if p.Next != "" {
			fmt.Fprintf(w, "next in %s: %s\n", p.Shard, p.Next)
		}
		for _, b := range p.Blocked {
			fmt.Fprintf(w, "blocked in %s: %s\n", p.Shard, b)
		}
	}
}

// printBrakes says where pods of lost nodes stay because too much of a zone is lost, and why.
func printBrakes(w io.Writer, st client.Status) {
	for _, z := range st.Zones {
		if z.Braked && z.Ready == 0 && z.Evictions != "stopped" {
			fmt.Fprintf(w, "\nevictions in zone %s: %s for %s: all of its %d nodes are not ready, so others take over, slowly; the pods of %d lost nodes wait for their turn\n",
				z.Name, z.Evictions, short(z.SinceSeconds), z.NotReady, z.Held)
		} else if z.Braked {
			fmt.Fprintf(w, "\nevictions in zone %s: %s for %s: %d of %d nodes are not ready, which looks like a partition and not like deaths; the pods of %d lost nodes stay\n",
				z.Name, z.Evictions, short(z.SinceSeconds), z.NotReady, z.Ready+z.NotReady, z.Held)
		} else if z.Brakes > 0 {
			fmt.Fprintf(w, "\nevictions in zone %s: free for %s, after the brake held them %d times\n", z.Name, short(z.SinceSeconds), z.Brakes)
		}
	}
}

type tokenCmd struct {
	Create tokenCreateCmd `cmd:"" help:"Make a join token and print the join line."`
	List   tokenListCmd   `cmd:"" help:"List the join tokens (never their secrets)."`
	Revoke tokenRevokeCmd `cmd:"" help:"Make a join token worthless."`
}

type tokenCreateCmd struct {
	targetFlag
	output
	TTL         time.Duration `name:"ttl" help:"Life of the token; 0 means for ever." default:"24h"`
	MaxUses     int           `help:"How many nodes may join with it; 0 means any number." default:"0"`
	Description string        `help:"What the token is for."`
}

func (t *tokenCreateCmd) Run(ctx context.Context) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	tok, err := c.CreateToken(ctx, client.TokenRequest{Description: t.Description, TTLSeconds: int64(t.TTL / time.Second), MaxUses: t.MaxUses})
	if err != nil {
		return err
	}
	ms, err := c.Members(ctx)
	if err != nil {
		return err
	}
	return t.print(tok, func(w io.Writer) {
		fmt.Fprintln(w, tok.Text)
		for _, m := range ms {
			if m.Self {
				fmt.Fprintf(w, "\nJoin a node with:\n  skein join %s --token %s\n", m.Address, tok.Text)
			}
		}
	})
}

type tokenListCmd struct {
	targetFlag
	output
}

func (t *tokenListCmd) Run(ctx context.Context) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	ts, err := c.Tokens(ctx)
	if err != nil {
		return err
	}
	return t.print(ts, func(w io.Writer) {
		fmt.Fprintln(w, "ID\tEXPIRES\tUSES\tDESCRIPTION")
		for _, x := range ts {
			exp, uses := "never", strconv.Itoa(x.Uses)
			if x.Expires != nil {
				exp = x.Expires.Format(time.RFC3339)
			}
			if x.MaxUses > 0 {
				uses += "/" + strconv.Itoa(x.MaxUses)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", x.ID, exp, uses, orDash(x.Description))
		}
	})
}

type tokenRevokeCmd struct {
	targetFlag
	ID string `arg:"" help:"ID of the token, or the token itself."`
}

func (t *tokenRevokeCmd) Run(ctx context.Context) error {
	id := t.ID
	if p := strings.Split(id, "."); len(p) == 4 { // a whole token: its ID is the third part
		id = p[2]
	}
	c, err := t.client()
	if err != nil {
		return err
	}
	if err := c.RevokeToken(ctx, id); err != nil {
		return err
	}
	fmt.Printf("token %s revoked\n", id)
	return nil
}

type leaveCmd struct {
	stateFlag
}

func (l *leaveCmd) Run(ctx context.Context) error {
	if err := l.client().Leave(ctx); err != nil {
		return err
	}
	fmt.Println("this node has left the cluster; its pods and state are being removed")
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := daemon.AwaitEnd(ctx, l.StateDir); err != nil {
		return fmt.Errorf("the daemon has not ended yet (its log says why): %w", err)
	}
	fmt.Println("done")
	return nil
}

type kubeconfigCmd struct {
	targetFlag
	Server string        `help:"URL of the node to talk to (default: this node's address)."`
	User   string        `help:"Print one of this user instead of an administrator's; what he may is for RBAC to say."`
	Group  []string      `help:"Groups that the user is in."`
	TTL    time.Duration `name:"ttl" help:"How long the user's lasts; ten minutes to a year." default:"8760h"`
}

func (k *kubeconfigCmd) Run(ctx context.Context) error {
	if k.User == "" && len(k.Group) > 0 {
		return errors.New("--group is of a --user")
	}
	if k.User != "" && (k.TTL < 10*time.Minute || k.TTL > 365*24*time.Hour) {
		return fmt.Errorf("--ttl %s: want ten minutes to a year", k.TTL)
	}
	c, err := k.client()
	if err != nil {
		return err
	}
	b, err := c.Kubeconfig(ctx, k.Server)
	if err != nil {
		return err
	}
	if k.User != "" {
		if b, err = userKubeconfig(ctx, b, k.User, k.Group, k.TTL); err != nil {
			return err
		}
	}
	_, err = os.Stdout.Write(b)
	return err
}
