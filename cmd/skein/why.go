package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/i18n"
	"k8s.io/kubectl/pkg/util/templates"

	"skein.io/skein/node/client"
)

// newWhyCmd explains the placement of a pod. It takes kubectl's flags, and asks whichever node they name.
func newWhyCmd(f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	var format string
	var all bool
	cmd := &cobra.Command{
		Use:                   "why POD [-n NAMESPACE] [-o json|yaml] [--all]",
		DisableFlagsInUseLine: true,
		Short:                 i18n.T("Show why a pod is where it is, or why it is nowhere"),
		Long: templates.LongDesc(`Show, node by node, what refuses a pod or what it scores, what evicting other pods would free, and what change would let it run; for a pod that
			runs, why it is where it is. It takes the right to get the pod and to list nodes.`),
		Run: func(cmd *cobra.Command, args []string) {
			if len(args) != 1 {
				cmdutil.CheckErr(cmdutil.UsageErrorf(cmd, "the name of one pod is wanted"))
			}
			cmdutil.CheckErr(runWhy(cmd, f, streams.Out, strings.TrimPrefix(strings.TrimPrefix(args[0], "pods/"), "pod/"), format, all))
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "", "Output format: json or yaml.")
	cmd.Flags().BoolVar(&all, "all", false, "Show all nodes of a large cluster.")
	return cmd
}

func runWhy(cmd *cobra.Command, f cmdutil.Factory, out io.Writer, pod, format string, all bool) error {
	if format != "" && format != "json" && format != "yaml" {
		return cmdutil.UsageErrorf(cmd, "--output %q: want json or yaml", format)
	}
	namespace, _, err := f.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return err
	}
	clients, err := f.KubernetesClientSet()
	if err != nil {
		return err
	}
	result := clients.Discovery().RESTClient().Get().AbsPath("/skein/v1/why", namespace, pod).Do(cmd.Context())
	if err := result.Error(); err != nil { // Raw gives no words of refusals
		return err
	}
	raw, err := result.Raw()
	if err != nil {
		return err
	}
	var w client.Why
	if err := json.Unmarshal(raw, &w); err != nil {
		return fmt.Errorf("unreadable answer: %w", err)
	}
	if written, err := encode(out, format, w); written {
		return err
	}
	return printWhy(out, &w, time.Now(), all)
}

// maxWhy is how many nodes are shown of each sort, unless all are asked for.
const maxWhy = 20

func printWhy(out io.Writer, w *client.Why, now time.Time, all bool) error {
	var b strings.Builder
	switch {
	case w.Node == "":
		fmt.Fprintf(&b, "%s/%s is on no node.\n", w.Namespace, w.Pod)
	case w.Since.IsZero():
		fmt.Fprintf(&b, "%s/%s is on %s.\n", w.Namespace, w.Pod, w.Node)
	default:
		fmt.Fprintf(&b, "%s/%s is on %s, since %s.\n", w.Namespace, w.Pod, w.Node, now.Sub(w.Since).Truncate(time.Second))
	}
	for _, s := range w.Summary {
		fmt.Fprintln(&b, s)
	}
	if w.Message != "" {
		fmt.Fprintf(&b, "Its event says: %s\n", w.Message)
	}
	fit := 0
	for fit < len(w.Nodes) && len(w.Nodes[fit].Refusals) == 0 {
		fit++
	}
	printScores(&b, w, w.Nodes[:fit], all)
	printRefusals(&b, w.Nodes[fit:], all)
	_, err := io.WriteString(out, b.String())
	return err
}

func printScores(out io.Writer, w *client.Why, nodes []client.NodeReport, all bool) {
	if len(nodes) == 0 {
		return
	}
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprint(t, "NODE\tSCORE")
	for _, s := range nodes[0].Scores {
		fmt.Fprintf(t, "\t%s", s.Rule)
	}
	fmt.Fprintln(t)
	for i, n := range nodes {
		if i == maxWhy && !all {
			fmt.Fprintf(t, "... and %d more (--all)\n", len(nodes)-i)
			break
		}
		name := n.Node
		if name == w.Node {
			name += " (here)"
		}
		fmt.Fprintf(t, "%s\t%d", name, n.Total)
		for _, s := range n.Scores {
			fmt.Fprintf(t, "\t%d", s.Points)
		}
		fmt.Fprintln(t)
	}
	t.Flush() // to memory
}

func printRefusals(out io.Writer, nodes []client.NodeReport, all bool) {
	for i, n := range nodes {
		if i == maxWhy && !all {
			fmt.Fprintf(out, "\n... and %d more that refuse (--all)\n", len(nodes)-i)
			return
		}
		fmt.Fprintf(out, "\n%s refuses:\n", n.Node)
		for _, r := range n.Refusals {
			fmt.Fprintf(out, "  %s: %s\n", r.Filter, strings.Join(r.Reasons, ", "))
			for _, d := range r.Details {
				fmt.Fprintf(out, "    %s\n", d)
			}
			for _, h := range r.Help {
				fmt.Fprintf(out, "    would help: %s\n", h)
			}
		}
		if len(n.Evict) > 0 {
			budgets := ""
			if n.BreaksBudgets > 0 {
				budgets = fmt.Sprintf(" (%d against a disruption budget)", n.BreaksBudgets)
			}
			fmt.Fprintf(out, "  evicting %s would make room%s\n", strings.Join(n.Evict, ", "), budgets)
		}
	}
}
